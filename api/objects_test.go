package api

import (
	"errors"
	"math"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestEveryKindHasItsParts(t *testing.T) {
	for _, k := range Kinds {
		o := k.New()
		if KindOf(o) != k || StatusOf(o) == nil || specOf(o) == nil || o.Type() == nil || o.Meta() == nil {
			t.Errorf("%s is not complete", k.Kind)
		}
		StatusOf(o).ObservedGeneration = 7
		c := DeepCopy(o)
		if StatusOf(c).ObservedGeneration != 7 || reflect.TypeOf(c) != reflect.TypeOf(o) {
			t.Errorf("copy of %s: %#v", k.Kind, c)
		}
	}
}

func TestDeepCopySharesNothing(t *testing.T) {
	r := &Revision{ObjectMeta: ObjectMeta{Name: "r", Labels: map[string]string{"a": "b"}}}
	r.Spec.Containers = []Container{{Args: []string{"x"}, EnvFrom: raw(`[]`)}}
	r.Spec.TimeoutSeconds = ptr(int64(1))
	c := DeepCopy(r)
	c.Labels["a"], c.Spec.Containers[0].Args[0], *c.Spec.TimeoutSeconds = "c", "y", 2
	c.Spec.Containers[0].EnvFrom[0] = '{'
	if r.Labels["a"] != "b" || r.Spec.Containers[0].Args[0] != "x" || *r.Spec.TimeoutSeconds != 1 || string(r.Spec.Containers[0].EnvFrom) != "[]" {
		t.Errorf("the original changed: %+v", r)
	}
}

func TestEqualSpec(t *testing.T) {
	a, b := &Revision{}, &Revision{}
	a.Spec.Containers, b.Spec.Containers = []Container{{Image: "a", Env: []EnvVar{}, Resources: Resources{Limits: map[string]Quantity{}}}}, []Container{{Image: "a"}}
	a.Spec.Volumes, b.Spec.Volumes = raw(`[{"name":"v","x":1}]`), raw(`[ { "x":1, "name":"v" } ]`)
	a.Name, b.Status.LogURL = "a", "x"
	if !EqualSpec(a, b) {
		t.Error("what is the same on the wire is equal")
	}
	b.Spec.Volumes = raw(`[{"name":"v","x":2}]`)
	if EqualSpec(a, b) {
		t.Error("raw parts count")
	}
	if EqualSpec(&Route{}, &Service{}) || !EqualSpec(&Route{}, &Route{}) {
		t.Error("kinds count")
	}
}

func TestGenerateName(t *testing.T) {
	if got := GenerateName("hello", 1); got != "hello-00001" {
		t.Error(got)
	}
	if got := GenerateName("hello", 123456); got != "hello-123456" {
		t.Error(got)
	}
	seen := map[string]bool{}
	for _, tail := range []string{"a", "b"} {
		for _, n := range []int{57, 58, 63} {
			name := strings.Repeat("x", n-1) + tail
			got := GenerateName(name, 1)
			if checkDNS1035(got) != nil || !strings.HasSuffix(got, "-00001") || seen[got] {
				t.Errorf("%s: %s (%d)", name, got, len(got))
			}
			seen[got] = true
		}
	}
}

func TestRevisionAccessors(t *testing.T) {
	r := &Revision{ObjectMeta: ObjectMeta{Name: "hello-00001", Namespace: "default", Labels: map[string]string{LabelService: "hello", LabelConfiguration: "conf"}}}
	if r.Serving() != nil || r.Port() != 8080 || r.Protocol() != "http1" || r.Concurrency() != 0 || r.Ready() {
		t.Error("an empty revision")
	}
	if total, start, idle := r.Timeouts(); total != 5*time.Minute || start != 0 || idle != 0 {
		t.Error(total, start, idle)
	}
	r.Spec.Containers = []Container{{Name: "side"}, {Name: "main", Ports: []ContainerPort{{Name: "h2c", ContainerPort: 9000}}}}
	r.Spec.ContainerConcurrency, r.Spec.TimeoutSeconds = ptr(int64(10)), ptr(int64(20))
	r.Spec.ResponseStartTimeoutSeconds, r.Spec.IdleTimeoutSeconds = ptr(int64(5)), ptr(int64(3))
	r.Status.Conditions.Set(noon, ConditionReady, True, "", "")
	if r.ID() != "default/hello-00001" || r.Serving() != &r.Spec.Containers[1] || r.Port() != 9000 || r.Protocol() != "h2c" || r.Concurrency() != 10 || !r.Ready() {
		t.Errorf("%+v", r)
	}
	if total, start, idle := r.Timeouts(); total != 20*time.Second || start != 5*time.Second || idle != 3*time.Second {
		t.Error(total, start, idle)
	}
	if r.ServiceName() != "hello" || r.ConfigurationName() != "conf" {
		t.Error(r.ServiceName(), r.ConfigurationName())
	}
}

func TestScalingAnnotation(t *testing.T) {
	for _, tt := range []struct {
		ann    map[string]string
		suffix string
		want   string
		ok     bool
	}{
		{nil, ScalingMin, "", false},
		{map[string]string{"autoscaling.knative.dev/min-scale": "1"}, ScalingMin, "1", true},
		{map[string]string{"autoscaling.knative.dev/minScale": "2"}, ScalingMin, "2", true},
		{map[string]string{"autoscaling.knative.dev/minScale": "2", "autoscaling.knative.dev/min-scale": "1"}, ScalingMin, "1", true},
		{map[string]string{"autoscaling.knative.dev/scaleToZeroPodRetentionPeriod": "5s"}, ScalingRetention, "5s", true},
		{map[string]string{"autoscaling.knative.dev/window": ""}, ScalingWindow, "", true},
		{map[string]string{"autoscaling.knative.dev/nonsense": "1"}, "nonsense", "", false},
	} {
		if got, ok := ScalingAnnotation(tt.ann, tt.suffix); got != tt.want || ok != tt.ok {
			t.Errorf("%v %s: %q %v", tt.ann, tt.suffix, got, ok)
		}
	}
	// The camelCase spelling of a suffix is made of the same words.
	for suffix, spellings := range scalingSpellings {
		for _, s := range spellings {
			if strings.ToLower(s) != strings.ReplaceAll(suffix, "-", "") && s != suffix {
				t.Errorf("%s is no spelling of %s", s, suffix)
			}
		}
	}
}

func TestQuantityValue(t *testing.T) {
	for q, want := range map[Quantity]float64{
		"1": 1, "100m": 0.1, "64Mi": 64 << 20, "1.5Gi": 1.5 * (1 << 30), "2k": 2000, ".5": 0.5, "5.": 5, "1e3": 1000, "1E3": 1000, "1E": 1e18, "+1": 1, "-1M": -1e6, "100u": 1e-4, "1n": 1e-9, "12e-3": 0.012,
	} {
		got, err := q.Value()
		if err != nil || math.Abs(got-want) > math.Abs(want)*1e-12 {
			t.Errorf("%s: %v %v, want %v", q, got, err, want)
		}
	}
	for _, q := range []Quantity{"", "Mi", "1MB", "1 Mi", "0x10", "1e", "1e999", "--1", "1-1", "1_000", "NaN", "Inf", "1mi", "1K", ".", "-", Quantity(strings.Repeat("1", 65))} {
		if v, err := q.Value(); !errors.Is(err, ErrQuantity) {
			t.Errorf("%s: %v %v", q, v, err)
		}
	}
}

func TestUnsupported(t *testing.T) {
	s := good()
	SetDefaults(s)
	if u := Unsupported(s); len(u) != 0 {
		t.Errorf("everything is supported: %v", u)
	}
	s.Annotations = map[string]string{"networking.knative.dev/http-protocol": "Redirected"}
	s.Spec.Template.Annotations = map[string]string{"autoscaling.knative.dev/minscale": "1", "autoscaling.knative.dev/min-scale": "1", "queue.sidecar.serving.knative.dev/cpu-resource-limit": "1"}
	spec := &s.Spec.Template.Spec
	spec.Volumes, spec.ImagePullSecrets, spec.ServiceAccountName = raw(`[{"name":"v"}]`), raw(`[{}]`), "robot"
	spec.EnableServiceLinks = ptr(true)
	c := container(s)
	c.EnvFrom, c.VolumeMounts, c.SecurityContext = raw(`[{}]`), raw(`[{"name":"v"}]`), raw(`{"runAsUser":5}`)
	c.Env = []EnvVar{{Name: "A"}, {Name: "B", ValueFrom: raw(`{"secretKeyRef":{}}`)}}
	c.TerminationMessagePath = "/x"
	c.ReadinessProbe = &Probe{TCPSocket: &TCPSocketAction{Host: "10.0.0.1"}}
	c.LivenessProbe = &Probe{TerminationGracePeriodSeconds: ptr(int64(5))}
	c.Ports = []ContainerPort{{}}
	spec.Containers = append(spec.Containers, Container{Image: "b", SecurityContext: raw(` { } `)})
	want := []string{
		"metadata.annotations[networking.knative.dev/http-protocol]",
		"spec.template.metadata.annotations[autoscaling.knative.dev/minscale]",
		"spec.template.metadata.annotations[queue.sidecar.serving.knative.dev/cpu-resource-limit]",
		"spec.template.spec.containers[0].envFrom",
		"spec.template.spec.containers[0].env[1].valueFrom",
		"spec.template.spec.containers[0].livenessProbe.terminationGracePeriodSeconds",
		"spec.template.spec.containers[0].readinessProbe.tcpSocket.host",
		"spec.template.spec.containers[0].securityContext",
		"spec.template.spec.containers[0].terminationMessagePath",
		"spec.template.spec.containers[0].volumeMounts",
		"spec.template.spec.containers[1]",
		"spec.template.spec.enableServiceLinks",
		"spec.template.spec.imagePullSecrets",
		"spec.template.spec.serviceAccountName",
		"spec.template.spec.volumes",
	}
	var got []string
	for _, line := range Unsupported(s) {
		path, why, ok := strings.Cut(line, ": ")
		if !ok || why == "" || strings.ContainsAny(line, "\"\n") {
			t.Errorf("not a sentence for a header: %q", line)
		}
		got = append(got, path)
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %q\nwant %q", got, want)
	}
	d := &DomainMapping{Spec: DomainMappingSpec{TLS: raw(`{"secretName":"x"}`)}}
	if u := Unsupported(d); len(u) != 1 || !strings.HasPrefix(u[0], "spec.tls: ") {
		t.Error(u)
	}
}

// The page about the API names what the code knows, in the same words.
func TestDocsNameEverything(t *testing.T) {
	data, err := os.ReadFile("../docs/api-support.md")
	if err != nil {
		t.Fatal(err)
	}
	page := string(data)
	var want []string
	for _, names := range forbiddenFields {
		want = append(want, names...)
	}
	want = append(want, forbiddenSecurity...)
	for _, names := range ignoredFields {
		want = append(want, names...)
	}
	for suffix := range scalingSpellings {
		want = append(want, suffix)
	}
	for key := range ownAnnotations {
		want = append(want, key)
	}
	types := []reflect.Type{reflect.TypeFor[Container](), reflect.TypeFor[Probe](), reflect.TypeFor[TrafficTarget](), reflect.TypeFor[Reference]()}
	for _, k := range Kinds {
		want = append(want, ReadyDependents(k)...)
		types = append(types, reflect.TypeOf(specOf(k.New())).Elem())
	}
	for _, typ := range types {
		names := map[string]field{}
		collect(typ, nil, names)
		for n := range names {
			want = append(want, n)
		}
	}
	want = append(want, reservedEnv...)
	for _, p := range reservedPorts {
		want = append(want, strconv.Itoa(int(p)))
	}
	for _, w := range want {
		if !regexp.MustCompile(`[^A-Za-z0-9]` + regexp.QuoteMeta(w) + `[^A-Za-z0-9]`).MatchString(page) {
			t.Errorf("docs/api-support.md does not mention %s", w)
		}
	}
}
