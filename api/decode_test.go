package api

import (
	"encoding/json"
	"errors"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func TestDecodeErrors(t *testing.T) {
	spec := func(s string) string { return `{"spec":{"template":{"spec":` + s + `}}}` }
	con := func(s string) string { return spec(`{"containers":[` + s + `]}`) }
	for _, tt := range []struct{ name, data, want string }{
		{"empty", "", "the body is empty, expected a JSON object"},
		{"blanks", " \n\t", "the body is empty, expected a JSON object"},
		{"no JSON", "kind: Service", "invalid JSON at line 1, column 1: invalid character 'k' looking for beginning of value"},
		{"cut", `{"kind":"Service",`, "invalid JSON at line 1, column 18: unexpected end of JSON input"},
		{"third line", "{\n\"a\":1,\n  x}", "invalid JSON at line 3, column 3: invalid character 'x' looking for beginning of object key string"},
		{"two objects", `{}{}`, "invalid JSON at line 1, column 3: invalid character '{' after top-level value"},
		{"trailing data", `{} x`, "invalid JSON at line 1, column 4: invalid character 'x' after top-level value"},
		{"a list", `[]`, "expected an object of kind Service, got a list"},
		{"null", `null`, "expected an object of kind Service, got null"},
		{"a string", `"Service"`, `expected an object of kind Service, got the string "Service"`},
		{"broken UTF-8", "{\"metadata\":{\"name\":\"a\xff\"}}", "invalid UTF-8 at byte 22"},
		{"overlong UTF-8", "{\"a\":\"\xc0\xaf\"}", "invalid UTF-8 at byte 6"},
		{"too big", `{"a":"` + strings.Repeat("x", MaxObjectBytes) + `"}`, "the object has 1048584 bytes, more than 1048576"},
		{"too many", `{"a":[` + strings.Repeat("1,", MaxObjectValues) + "1]}", "the data has more than 10000 values"},
		{"too deep", strings.Repeat(`{"a":`, 70) + "1" + strings.Repeat("}", 70), "the data is nested more than 64 deep"},
		{"too deep list", `{"a":` + strings.Repeat("[", 5000) + strings.Repeat("]", 5000) + "}", "the data is nested more than 64 deep"},

		{"kind", `{"kind":"Route","apiVersion":"serving.knative.dev/v1","spec":{"traffic":3}}`, "the kind in the data (Route) does not match the expected kind (Service)"},
		{"apiVersion", `{"kind":"Service","apiVersion":"v1"}`, "the API version in the data (v1) does not match the expected API version (serving.knative.dev/v1)"},
		{"kind is a number", `{"kind":1}`, "kind: expected a string, got the number 1"},

		{"duplicate", `{"spec":{},"spec":{}}`, `duplicate field "spec"`},
		{"duplicate deep", con(`{"env":[{"name":"a"},{"name":"b","value":"x","value":"y"}]}`), `duplicate field "spec.template.spec.containers[0].env[1].value"`},
		{"duplicate by escape", `{"spec":{},"\u0073pec":{}}`, `duplicate field "spec"`},
		{"duplicate in what is kept raw", spec(`{"volumes":[{"name":"a","name":"b"}]}`), `duplicate field "spec.template.spec.volumes[0].name"`},

		{"string for int", spec(`{"timeoutSeconds":"5"}`), `spec.template.spec.timeoutSeconds: expected an integer, got the string "5"`},
		{"fraction", spec(`{"timeoutSeconds":1.5}`), "spec.template.spec.timeoutSeconds: expected an integer, got the number 1.5"},
		{"int64 range", spec(`{"timeoutSeconds":99999999999999999999}`), "spec.template.spec.timeoutSeconds: expected an integer of 64 bits, got the number 99999999999999999999"},
		{"int32 range", con(`{"ports":[{"containerPort":4294967296}]}`), "spec.template.spec.containers[0].ports[0].containerPort: expected an integer of 32 bits, got the number 4294967296"},
		{"object for list", spec(`{"containers":{}}`), "spec.template.spec.containers: expected a list, got an object"},
		{"list for object", `{"spec":[]}`, "spec: expected an object, got a list"},
		{"string for object", con(`"x"`), `spec.template.spec.containers[0]: expected an object, got the string "x"`},
		{"number for string", con(`{"image":1}`), "spec.template.spec.containers[0].image: expected a string, got the number 1"},
		{"env value not quoted", con(`{"env":[{"name":"A","value":true}]}`), "spec.template.spec.containers[0].env[0].value: expected a string, got true"},
		{"label not quoted", `{"metadata":{"labels":{"a":1}}}`, "metadata.labels.a: expected a string, got the number 1"},
		{"annotation not quoted", `{"spec":{"template":{"metadata":{"annotations":{"autoscaling.knative.dev/min-scale":1}}}}}`,
			"spec.template.metadata.annotations.autoscaling.knative.dev/min-scale: expected a string, got the number 1"},
		{"labels list", `{"metadata":{"labels":["a"]}}`, "metadata.labels: expected an object, got a list"},
		{"bool", `{"spec":{"traffic":[{"latestRevision":"true"}]}}`, `spec.traffic[0].latestRevision: expected true or false, got the string "true"`},
		{"percent", `{"spec":{"traffic":[{"percent":"50%"}]}}`, `spec.traffic[0].percent: expected an integer, got the string "50%"`},
		{"quantity", con(`{"resources":{"limits":{"cpu":true}}}`), "spec.template.spec.containers[0].resources.limits.cpu: expected a quantity such as 100m or 64Mi, got true"},
		{"port", con(`{"readinessProbe":{"httpGet":{"port":1.5}}}`), "spec.template.spec.containers[0].readinessProbe.httpGet.port: expected a port number or name, got the number 1.5"},
		{"time", `{"metadata":{"creationTimestamp":"yesterday"}}`, `metadata.creationTimestamp: expected a time such as 2006-01-02T15:04:05Z, got the string "yesterday"`},

		{"affinity", spec(`{"affinity":{"nodeAffinity":{}},"containers":[]}`), "must not set the field(s): spec.template.spec.affinity"},
		{"several", spec(`{"hostNetwork":true,"nodeSelector":{"a":"b"},"containers":[{"lifecycle":{"preStop":{}},"ports":[{"hostPort":80}]}]}`),
			"must not set the field(s): spec.template.spec.containers[0].lifecycle, spec.template.spec.containers[0].ports[0].hostPort, spec.template.spec.hostNetwork, spec.template.spec.nodeSelector"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o, unknown, err := Decode(Services, []byte(tt.data))
			if err == nil {
				t.Fatalf("accepted: %#v %v", o, unknown)
			}
			if err.Error() != tt.want {
				t.Errorf("got  %s\nwant %s", err, tt.want)
			}
			var bad *DecodeError
			var invalid Errors
			if !errors.As(err, &bad) && !errors.As(err, &invalid) {
				t.Errorf("error of type %T", err)
			}
			if o != nil {
				t.Errorf("object beside an error: %v", o)
			}
		})
	}
}

func TestDecodeUnknownFields(t *testing.T) {
	for _, tt := range []struct {
		name, data string
		want       []string
	}{
		{"none", `{"metadata":{"name":"a"}}`, nil},
		{"sorted, with paths", `{"zzz":1,"spec":{"template":{"spec":{"containers":[{"imagee":"x","image":"y"}],"foo":{"bar":1}}}}}`,
			[]string{"spec.template.spec.containers[0].imagee", "spec.template.spec.foo", "zzz"}},
		{"case counts", `{"Spec":{},"metadata":{"Name":"x"}}`, []string{"Spec", "metadata.Name"}},
		{"known to Kubernetes", `{"metadata":{"managedFields":[{}],"selfLink":"x"}}`, nil},
		{"status is not looked at", `{"status":{"foo":1,"conditions":[{"type":"Ready","status":"True","bar":2}]}}`, nil},
		{"forbidden but empty", `{"spec":{"template":{"spec":{"affinity":null,"hostNetwork":false,"nodeSelector":{},"restartPolicy":""}}}}`, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o, got, err := Decode(Services, []byte(tt.data))
			if err != nil || !slices.Equal(got, tt.want) {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
			if s := o.(*Service); s.Name == "x" {
				t.Error("a name in the wrong case was taken")
			}
		})
	}
}

func TestDecodeFills(t *testing.T) {
	data := `{
		"metadata": {"name": "hello", "creationTimestamp": "2026-11-20T10:52:24+01:00", "labels": {"a": null}},
		"spec": {"template": {"spec": {
			"containerConcurrency": null,
			"timeoutSeconds": 30,
			"volumes": [ {"name":  "v"} ],
			"containers": [{
				"name": "",
				"args": ["a\u00e9", null],
				"resources": {"limits": {"cpu": 1, "memory": "64Mi"}, "requests": {"cpu": 0.5}},
				"readinessProbe": {"httpGet": {"port": "http", "path": "/"}},
				"livenessProbe": {"tcpSocket": {"port": 8080}}
			}]
		}}}
	}`
	o, unknown, err := Decode(Services, []byte(data))
	if err != nil || unknown != nil {
		t.Fatal(unknown, err)
	}
	s := o.(*Service)
	if s.TypeMeta != (TypeMeta{"Service", ServingV1}) {
		t.Errorf("kind not filled in: %v", s.TypeMeta)
	}
	if !s.CreationTimestamp.Equal(time.Date(2026, 11, 20, 9, 52, 24, 0, time.UTC)) {
		t.Errorf("time %v", s.CreationTimestamp)
	}
	spec := &s.Spec.Template.Spec
	c := &spec.Containers[0]
	if spec.ContainerConcurrency != nil || *spec.TimeoutSeconds != 30 || string(spec.Volumes) != `[ {"name":  "v"} ]` {
		t.Errorf("spec %+v", spec)
	}
	if !slices.Equal(c.Args, []string{"aé", ""}) || c.Resources.Limits["cpu"] != "1" || c.Resources.Requests["cpu"] != "0.5" {
		t.Errorf("container %+v", c)
	}
	if c.ReadinessProbe.HTTPGet.Port != (IntOrString{String: "http"}) || c.LivenessProbe.TCPSocket.Port != (IntOrString{Int: 8080}) {
		t.Errorf("probes %+v %+v", c.ReadinessProbe.HTTPGet, c.LivenessProbe.TCPSocket)
	}
}

// Decode writes into the types itself; encoding/json is the second way to the same answer for whatever both accept.
func TestDecodeAgreesWithEncodingJSON(t *testing.T) {
	for name, data := range bodies(t) {
		k := Services
		if strings.Contains(name, "domainmapping") {
			k = DomainMappings
		}
		got, _, err := Decode(k, data)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want := k.New()
		if err := json.Unmarshal(data, want); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s:\ngot  %+v\nwant %+v", name, got, want)
		}
	}
}

func TestForbiddenFieldsAreNotKnown(t *testing.T) {
	for typ, names := range forbiddenFields {
		m := map[string]field{}
		collect(typ, nil, m)
		for _, n := range names {
			if _, ok := m[n]; ok {
				t.Errorf("%v.%s is both a field and forbidden", typ, n)
			}
		}
		if !slices.IsSorted(names) {
			t.Errorf("%v: names are not sorted", typ)
		}
	}
}

// Bodies with as many values as allowed, in the shapes that cost most, are dealt with in some 50 ms. Before values were counted,
// looking for the serving container once per container made one of these take more than ten minutes.
func TestHostileBodiesAreCheap(t *testing.T) {
	// many repeats part, which has so many values, with # as its number.
	many := func(head, part string, values int, tail string) []byte {
		var b strings.Builder
		b.WriteString(head)
		for i := range (MaxObjectValues - 100) / values {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString(strings.ReplaceAll(part, "#", strconv.Itoa(i)))
		}
		return []byte(b.String() + tail)
	}
	template := func(s string) string { return `{"spec":{"template":{"spec":{` + s }
	deep := strings.Repeat(`{"`+strings.Repeat("k", 4000)+`":`, 60)
	for name, data := range map[string][]byte{
		"long path, long list": many(deep+"[", "1", 1, "]"+strings.Repeat("}", 60)),
		"long strings":         []byte(`{"metadata":{"annotations":{"a":"` + strings.Repeat("x", MaxObjectBytes-100) + `"}}}`),
		"unknown fields":       many("{", `"u#":0`, 1, "}"),
		"env without names":    many(template(`"containers":[{"env":[`), "{}", 1, `]}]}}}}`),
		"containers":           many(template(`"containers":[`), "{}", 1, `]}}}}`),
		"sidecars":             many(template(`"containers":[`), `{"securityContext":{"a":1}}`, 3, `]}}}}`),
		"tags":                 many(`{"spec":{"traffic":[`, `{"tag":"t#"}`, 2, `]}}`),
		"the same tag":         many(`{"spec":{"traffic":[`, `{"tag":"t"}`, 2, `]}}`),
		"labels":               many(`{"metadata":{"labels":{`, `"l#":"x y"`, 1, `}}}`),
		"volumes":              many(template(`"volumes":[`), `{"name":"v#"}`, 2, `]}}}}`),
		"mounts":               many(template(`"containers":[{"volumeMounts":[`), `{"name":"v#"}`, 2, `]}]}}}}`),
		"quantities":           many(template(`"containers":[{"resources":{"limits":{`), `"q#":1`, 1, `}}}]}}}}`),
		"forbidden":            many(template(`"containers":[`), `{"tty":true}`, 2, `]}}}}`),
	} {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			o, unknown, err := Decode(Services, data)
			var errs Errors
			if errors.As(err, &errs); err == nil {
				SetDefaults(o)
				errs = Validate(o, DeepCopy(o), DefaultLimits)
				_ = Unsupported(o)
			} else if errs == nil {
				t.Fatalf("not read: %v", err)
			}
			text := errs.Error()
			took := time.Since(began)
			t.Logf("%d bytes: %v, %d unknown, %d errors in %d bytes", len(data), took, len(unknown), len(errs), len(text))
			if len(errs) > maxErrors+1 {
				t.Errorf("%d errors", len(errs))
			}
			if took > 30*time.Second { // for the slowest of machines with the race detector
				t.Errorf("took %v", took)
			}
		})
	}
}
