package api

import (
	"bytes"
	"encoding/json"
	"reflect"
	"testing"
)

// FuzzDecode: whatever comes, nothing panics, and what was accepted is stable: written and read again it is the same.
func FuzzDecode(f *testing.F) {
	for _, data := range bodies(f) {
		f.Add(0, data)
	}
	f.Add(1, []byte(`{"metadata":{"name":"c"},"spec":{"template":{"metadata":{"name":"c-1"},"spec":{"containers":[{"image":"a","envFrom":[{}]},{"image":"b","ports":[{}]}]}}}}`))
	f.Add(2, []byte(`{"spec":{"containers":[{"resources":{"limits":{"cpu":1e3}},"livenessProbe":{"grpc":{"port":1}}}],"volumes":[ {"name":"a"} ]}}`))
	f.Add(3, []byte(`{"spec":{"traffic":[{"tag":"a","percent":50},{"tag":"a","percent":9223372036854775807}]}}`))
	f.Add(4, []byte(`{"kind":"DomainMapping","metadata":{"name":"a.b"},"spec":{"ref":{"name":"x"},"tls":{}}}`))
	f.Add(0, []byte(`{"a":[[[]]],"a":1}`))
	f.Add(0, []byte("{\"a\":\"\\ud800\xff\"}"))
	f.Fuzz(func(t *testing.T, which int, data []byte) {
		k := Kinds[uint(which)%uint(len(Kinds))]
		o, unknown, err := Decode(k, data)
		if err != nil {
			if o != nil || unknown != nil {
				t.Fatal("an object beside an error")
			}
			return
		}
		if len(unknown) == 0 {
			checkAgrees(t, k, o, data)
		}
		SetDefaults(o)
		errs := Validate(o, nil, DefaultLimits)
		_ = errs.Error()
		_ = Unsupported(o)
		if r, ok := o.(*Revision); ok {
			r.Port()
			r.Timeouts()
		}
		old := DeepCopy(o)
		if after := Validate(o, old, DefaultLimits); len(errs) == 0 && len(after) > 0 {
			t.Fatalf("the same object is valid alone but not over itself: %v", after)
		}
		first, err := json.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if len(first) > MaxObjectBytes {
			return // defaults have made it too big to be read again
		}
		back, unknown, err := Decode(k, first)
		if err != nil || len(unknown) > 0 {
			t.Fatalf("what was written is not read: %v %v\n%s", unknown, err, first)
		}
		SetDefaults(back)
		second, err := json.Marshal(back)
		if err != nil || string(second) != string(first) {
			t.Fatalf("not stable: %v\n%s\n%s", err, first, second)
		}
	})
}

// checkAgrees compares with encoding/json, the second way to the same answer, where the two do not mean to differ: null in
// what is kept raw, what is empty, and the letters of names in status, which Decode does not report.
func checkAgrees(t *testing.T, k *Kind, o Object, data []byte) {
	t.Helper()
	if bytes.Contains(data, []byte("null")) {
		return
	}
	want := k.New()
	if err := json.Unmarshal(data, want); err != nil {
		t.Fatalf("encoding/json refuses what Decode takes: %v", err)
	}
	a, b := prune(tree([]any{o.Meta(), specOf(o)})), prune(tree([]any{want.Meta(), specOf(want)}))
	if !reflect.DeepEqual(a, b) {
		t.Fatalf("not what encoding/json reads:\n%v\n%v", a, b)
	}
}

// prune takes away what is empty.
func prune(v any) any {
	switch v := v.(type) {
	case map[string]any:
		for key, e := range v {
			if e = prune(e); e == nil {
				delete(v, key)
			} else {
				v[key] = e
			}
		}
		if len(v) == 0 {
			return nil
		}
	case []any:
		for i := range v {
			v[i] = prune(v[i])
		}
		if len(v) == 0 {
			return nil
		}
	}
	return v
}

// FuzzQuantity: no text makes a quantity that is no number.
func FuzzQuantity(f *testing.F) {
	for _, s := range []string{"1", "100m", "64Mi", "1e3", "1E", "-.5k", "1e127", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if v, err := Quantity(s).Value(); err == nil && v != v {
			t.Errorf("%q is %v", s, v)
		}
	})
}

// FuzzImage: checks of syntax never panic.
func FuzzImage(f *testing.F) {
	for _, s := range []string{"a", "a/b:c@sha256:0", "exec:///x", "pkg://", "localhost:5000/a", "[::1]:5000/a", "a:b:c", ""} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		checkImage(s)
		checkKey(s)
		checkHost(s)
		checkDNS1035Prefix(s)
	})
}
