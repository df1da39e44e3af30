package api

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// bodies are the objects that kn and kubectl really send.
func bodies(t testing.TB) map[string][]byte {
	t.Helper()
	files, err := filepath.Glob("testdata/dialogue/*.json")
	if err != nil || len(files) < 10 {
		t.Fatal(files, err)
	}
	m := map[string][]byte{}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		m[strings.TrimSuffix(filepath.Base(f), ".json")] = data
	}
	return m
}

func TestDialogueBodiesAreAccepted(t *testing.T) {
	for name, data := range bodies(t) {
		t.Run(name, func(t *testing.T) {
			k := Services
			if strings.Contains(name, "domainmapping") {
				k = DomainMappings
			}
			o, unknown, err := Decode(k, data)
			if err != nil || len(unknown) > 0 {
				t.Fatal(unknown, err)
			}
			SetDefaults(o)
			if errs := Validate(o, nil, DefaultLimits); errs != nil {
				t.Error(errs)
			}
			if u := Unsupported(o); len(u) > 0 {
				t.Error(u)
			}
			if s, ok := o.(*Service); ok && s.Spec.Template.Spec.Containers[0].Name != "user-container" {
				t.Errorf("container is named %q", s.Spec.Template.Spec.Containers[0].Name)
			}
			checkRoundTrip(t, k, o)
			checkNothingLost(t, data, o)
		})
	}
}

// checkRoundTrip: what is written is read as the same object, and defaults are set once for all.
func checkRoundTrip(t *testing.T, k *Kind, o Object) {
	t.Helper()
	first, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	back, unknown, err := Decode(k, first)
	if err != nil || len(unknown) > 0 {
		t.Fatalf("%v %v in %s", unknown, err, first)
	}
	SetDefaults(back)
	second, err := json.Marshal(back)
	if err != nil {
		t.Fatal(err)
	}
	if string(first) != string(second) {
		t.Errorf("not the same after a round trip:\n%s\n%s", first, second)
	}
	if !EqualSpec(o, back) {
		t.Errorf("specs differ after a round trip: %s", first)
	}
}

// checkNothingLost: each leaf of the body is in the object's JSON at the same place, except where a default replaces an
// empty value.
func checkNothingLost(t *testing.T, body []byte, o Object) {
	t.Helper()
	data, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	var want, got any
	if err := json.Unmarshal(body, &want); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	var contains func(path string, want, got any)
	contains = func(path string, want, got any) {
		switch w := want.(type) {
		case map[string]any:
			g, _ := got.(map[string]any)
			for key, v := range w {
				contains(join(path, key), v, g[key])
			}
		case []any:
			g, _ := got.([]any)
			if len(g) != len(w) {
				t.Errorf("%s: %d elements became %d", path, len(w), len(g))
				return
			}
			for i := range w {
				contains(path, w[i], g[i])
			}
		default:
			if want != "" && want != got {
				t.Errorf("%s: %v became %v", path, want, got)
			}
		}
	}
	contains("", want, got)
}

// The recorded updates one after another, each against the one before it.
func TestDialogueUpdates(t *testing.T) {
	all := bodies(t)
	step := func(name string) *Service {
		o, _, err := Decode(Services, all[name])
		if err != nil {
			t.Fatal(err)
		}
		SetDefaults(o)
		return o.(*Service)
	}
	create, named, split := step("kn-01-service-create-hello"), step("kn-02-service-replace-hello"), step("kn-03-service-replace-hello")
	scaled, forced := step("kn-04-service-replace-hello"), step("kn-07-service-replace-hello")
	for _, pair := range [][2]*Service{{create, named}, {named, split}, {split, forced}} {
		if errs := Validate(pair[1], pair[0], DefaultLimits); errs != nil {
			t.Error(errs)
		}
	}
	if EqualSpec(named, split) || !EqualSpec(named, DeepCopy(named)) {
		t.Error("EqualSpec")
	}
	// --scale-init without --revision-name keeps the given name over a changed template: Validate refuses that as Knative
	// does, so the API server frees the name first.
	want := `Saw the following changes without a name change (-old +new): spec.template.metadata.name (metadata.annotations.autoscaling.knative.dev/initial-scale: +"2")`
	if got := Validate(scaled, split, DefaultLimits).Error(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	if w := FreeName(scaled, split); w == "" || scaled.Spec.Template.Name != "" {
		t.Errorf("name %q, warning %q", scaled.Spec.Template.Name, w)
	}
	if errs := Validate(scaled, split, DefaultLimits); errs != nil {
		t.Error(errs)
	}
}

// FreeName is for changes of labels and annotations alone.
func TestFreeName(t *testing.T) {
	old := &Service{}
	old.Spec.Template.Name = "s-a"
	old.Spec.Template.Spec.Containers = []Container{{Image: "x"}}
	for _, c := range []struct {
		name   string
		change func(*Service)
		freed  bool
	}{
		{"nothing", func(*Service) {}, false},
		{"annotation", func(s *Service) { s.Spec.Template.Annotations = map[string]string{"a": "b"} }, true},
		{"label", func(s *Service) { s.Spec.Template.Labels = map[string]string{"a": "b"} }, true},
		{"image", func(s *Service) { s.Spec.Template.Spec.Containers[0].Image = "y" }, false},
		{"image and annotation", func(s *Service) {
			s.Spec.Template.Spec.Containers[0].Image = "y"
			s.Spec.Template.Annotations = map[string]string{"a": "b"}
		}, false},
		{"another name", func(s *Service) {
			s.Spec.Template.Name = "s-b"
			s.Spec.Template.Annotations = map[string]string{"a": "b"}
		}, false},
	} {
		o := DeepCopy(old)
		c.change(o)
		was := o.Spec.Template.Name
		if w := FreeName(o, old); (w != "") != c.freed || (o.Spec.Template.Name == "") != c.freed || !c.freed && o.Spec.Template.Name != was {
			t.Errorf("%s: name %q, warning %q", c.name, o.Spec.Template.Name, w)
		}
	}
}
