package api

import "testing"

// One object's way through the package when it is sent, with what its copy costs.
func BenchmarkDecode(b *testing.B) {
	data := bodies(b)["kn-03-service-replace-hello"]
	b.SetBytes(int64(len(data)))
	b.ReportAllocs()
	for b.Loop() {
		if _, _, err := Decode(Services, data); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkValidate(b *testing.B) {
	o, _, err := Decode(Services, bodies(b)["kn-03-service-replace-hello"])
	if err != nil {
		b.Fatal(err)
	}
	SetDefaults(o)
	b.ReportAllocs()
	for b.Loop() {
		if errs := Validate(o, o, DefaultLimits); errs != nil {
			b.Fatal(errs)
		}
	}
}

func BenchmarkDeepCopy(b *testing.B) {
	o, _, err := Decode(Services, bodies(b)["kn-03-service-replace-hello"])
	if err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		DeepCopy(o)
	}
}
