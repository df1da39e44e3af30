package api

import (
	"encoding/json"
	"strings"
	"testing"
)

// good returns a service that is valid as it is, with its defaults.
func good() *Service {
	s := &Service{ObjectMeta: ObjectMeta{Name: "hello", Namespace: "default"}}
	s.Spec.Template.Spec.Containers = []Container{{Image: "dev.local/hello"}}
	return s
}

const (
	label1035 = "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')"
	label1123 = "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')"
	subdomain = "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
	nameShape = "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"

	pod  = "spec.template.spec"
	con  = pod + ".containers[0]"
	anns = "spec.template.metadata.annotations"
	auto = anns + ".autoscaling.knative.dev/"
)

func container(s *Service) *Container { return &s.Spec.Template.Spec.Containers[0] }

func raw(s string) json.RawMessage { return json.RawMessage(s) }

// ann sets one annotation of the template.
func ann(key, value string) func(*Service) {
	return func(s *Service) { s.Spec.Template.Annotations = map[string]string{key: value} }
}

// scale sets annotations of the autoscaler: key, value, key, value.
func scale(pairs ...string) func(*Service) {
	return func(s *Service) {
		s.Spec.Template.Annotations = map[string]string{}
		for i := 0; i < len(pairs); i += 2 {
			s.Spec.Template.Annotations[AutoscalingGroup+"/"+pairs[i]] = pairs[i+1]
		}
	}
}

func traffic(t ...TrafficTarget) func(*Service) {
	return func(s *Service) { s.Spec.Traffic = t }
}

func latest(percent int64) TrafficTarget { return TrafficTarget{Percent: &percent} }

func pinned(name string, percent int64) TrafficTarget {
	return TrafficTarget{RevisionName: name, Percent: &percent}
}

func tagged(tag string, t TrafficTarget) TrafficTarget { t.Tag = tag; return t }

func readiness(p Probe) func(*Service) {
	return func(s *Service) { container(s).ReadinessProbe = &p }
}

func liveness(p Probe) func(*Service) {
	return func(s *Service) { container(s).LivenessProbe = &p }
}

func env(e ...EnvVar) func(*Service) { return func(s *Service) { container(s).Env = e } }

func port(p ...ContainerPort) func(*Service) { return func(s *Service) { container(s).Ports = p } }

func two(c ...Container) func(*Service) {
	return func(s *Service) { s.Spec.Template.Spec.Containers = c }
}

func image(ref string) func(*Service) { return func(s *Service) { container(s).Image = ref } }

func resources(limit, request string) func(*Service) {
	return func(s *Service) {
		container(s).Resources = Resources{Limits: map[string]Quantity{"memory": Quantity(limit)}, Requests: map[string]Quantity{"memory": Quantity(request)}}
	}
}

func TestValidateService(t *testing.T) {
	long := strings.Repeat("x", 300)
	label63 := strings.Repeat("x", 63)
	for _, tt := range []struct {
		name string
		edit func(*Service)
		want string // the whole error; empty = valid
	}{
		{"good", func(*Service) {}, ""},

		// Names.
		{"no name", func(s *Service) { s.Name = "" }, "name or generateName is required: metadata.name"},
		{"generateName", func(s *Service) { s.Name, s.GenerateName = "", "hello-" }, ""},
		{"bad generateName", func(s *Service) { s.Name, s.GenerateName = "", "1-" }, "not a DNS 1035 label prefix: [" + label1035 + "]: metadata.generateName"},
		{"upper case", func(s *Service) { s.Name = "Hello" }, "not a DNS 1035 label: [" + label1035 + "]: metadata.name"},
		{"dot", func(s *Service) { s.Name = "hello.world" }, "not a DNS 1035 label: [" + label1035 + "]: metadata.name"},
		{"path trick", func(s *Service) { s.Name = "../etc" }, "not a DNS 1035 label: [" + label1035 + "]: metadata.name"},
		{"63 characters", func(s *Service) { s.Name = label63 }, ""},
		{"64 characters", func(s *Service) { s.Name = label63 + "x" }, "not a DNS 1035 label: [must be no more than 63 characters]: metadata.name"},
		{"300 characters", func(s *Service) { s.Name = long }, "not a DNS 1035 label: [must be no more than 63 characters]: metadata.name"},
		{"namespace", func(s *Service) { s.Namespace = "a/b" }, "invalid value: a/b: metadata.namespace (" + label1123 + ")"},

		// Labels and annotations.
		{"label key", func(s *Service) { s.Labels = map[string]string{"a b": ""} }, `invalid key name "a b": metadata.labels (` + nameShape + ")"},
		{"label without name", func(s *Service) { s.Labels = map[string]string{"example.com/": ""} }, `invalid key name "example.com/": metadata.labels (name part must be non-empty)`},
		{"label prefix", func(s *Service) { s.Labels = map[string]string{"A_/x": ""} }, `invalid key name "A_/x": metadata.labels (prefix part ` + subdomain + ")"},
		{"label value", func(s *Service) { s.Labels = map[string]string{"a": strings.Repeat("x", 64)} }, "invalid value: " + strings.Repeat("x", 64) + ": metadata.labels.a (must be no more than 63 characters)"},
		{"annotation key", func(s *Service) { s.Annotations = map[string]string{"": ""} }, `invalid key name "": metadata.annotations (name part must be non-empty)`},
		{"annotations too long", func(s *Service) { s.Annotations = map[string]string{"a": strings.Repeat("x", maxAnnotations)} }, "Too long: may not be more than 262144 bytes: metadata.annotations"},
		{"visibility", func(s *Service) { s.Labels = map[string]string{LabelVisibility: "private"} }, `invalid value: private: metadata.labels.networking.knative.dev/visibility (the only value is "cluster-local")`},
		{"visibility cluster-local", func(s *Service) { s.Labels = map[string]string{LabelVisibility: "cluster-local"} }, ""},
		{"autoscaling annotation in the wrong place", func(s *Service) { s.Annotations = map[string]string{"autoscaling.knative.dev/min-scale": "1"} },
			`invalid key name "autoscaling.knative.dev/min-scale": metadata.annotations (autoscaling annotations must be put under "spec.template.metadata.annotations" to work)`},
		{"own annotation in the wrong place", func(s *Service) { s.Annotations = map[string]string{AnnotationSocket: "fd3"} },
			`invalid key name "instance.thaw.run/socket": metadata.annotations (the annotation must be put under "spec.template.metadata.annotations" to work)`},
		{"unknown own annotation", func(s *Service) { s.Annotations = map[string]string{"thaw.run/x": ""} }, `invalid key name "thaw.run/x": metadata.annotations (there is no such annotation)`},
		{"socket", ann(AnnotationSocket, "fd3"), ""},
		{"socket fd4", ann(AnnotationSocket, "fd4"), "invalid value: fd4: " + anns + ".instance.thaw.run/socket (expected fd3)"},
		{"sticky by cookie", ann(AnnotationSticky, "cookie"), ""},
		{"sticky by header", ann(AnnotationSticky, "header:X-User"), ""},
		{"sticky by nothing", ann(AnnotationSticky, "header:"), "invalid value: header:: " + anns + ".route.thaw.run/sticky (expected cookie or header:NAME, the name of a header of the request)"},
		{"sticky by no token", ann(AnnotationSticky, "header:X User"), "invalid value: header:X User: " + anns + ".route.thaw.run/sticky (expected cookie or header:NAME, the name of a header of the request)"},
		{"slow start", ann(AnnotationSlowStart, "0s"), ""},
		{"slow start too long", ann(AnnotationSlowStart, "11m"), "invalid value: 11m: " + anns + ".route.thaw.run/slow-start (expected a duration from 0s to 10m0s)"},
		{"queue of none", ann(AnnotationQueueMaxRequests, "0"), "invalid value: 0: " + anns + ".queue.thaw.run/max-requests (expected a number from 1 to 1000000)"},
		{"queue bytes", ann(AnnotationQueueMaxBytes, "64Mi"), ""},
		{"queue bytes no quantity", ann(AnnotationQueueMaxBytes, "many"), "invalid value: many: " + anns + ".queue.thaw.run/max-bytes (expected a quantity of bytes of at least 1Ki, such as 64Mi)"},
		{"queue wait", ann(AnnotationQueueMaxWait, "999ms"), "invalid value: 999ms: " + anns + ".queue.thaw.run/max-wait (expected a duration from 1s to 1h0m0s)"},
		{"time-out of the route", func(s *Service) {
			s.Annotations = map[string]string{AnnotationTimeout: "1.5s", AnnotationIdleTimeout: "600s"}
		}, ""},
		{"time-out beyond the cap", func(s *Service) { s.Annotations = map[string]string{AnnotationResponseStartTimeout: "601s"} },
			"invalid value: 601s: metadata.annotations.route.thaw.run/response-start-timeout (expected a duration from 1ms to 10m0s)"},
		{"time-out of the route on the template", ann(AnnotationTimeout, "1s"),
			`invalid key name "route.thaw.run/timeout": ` + anns + " (the annotation belongs to a Service, a Route or a DomainMapping itself)"},
		{"unknown instance annotation", ann("instance.thaw.run/sokcet", "fd3"), `invalid key name "instance.thaw.run/sokcet": ` + anns + " (there is no such annotation)"},
		{"planner", ann(AnnotationPlanner, "oracle"), "invalid value: oracle: " + anns + ".autoscaling.thaw.run/planner (expected kpa or predictive)"},
		{"event-driven", ann(AnnotationEventDriven, "yes"), "invalid value: yes: " + anns + ".autoscaling.thaw.run/event-driven (expected true or false)"},
		{"rollout-duration", func(s *Service) { s.Annotations = map[string]string{AnnotationRolloutDuration: "120s"} }, ""},
		{"rollout-duration no duration", func(s *Service) { s.Annotations = map[string]string{AnnotationRolloutDuration: "120"} }, "invalid value: 120: metadata.annotations.serving.knative.dev/rollout-duration"},
		{"rollout-duration precision", func(s *Service) { s.Annotations = map[string]string{AnnotationRolloutDuration: "1500ms"} }, "rollout-duration=1500ms is not at second precision: metadata.annotations.serving.knative.dev/rollout-duration"},
		{"rollout-duration negative", func(s *Service) { s.Annotations = map[string]string{AnnotationRolloutDuration: "-1s"} }, "rollout-duration=-1s must be positive: metadata.annotations.serving.knative.dev/rollout-duration"},
		{"progress-deadline", ann(AnnotationProgressDeadline, "0s"), "progress-deadline=0s must be positive: " + anns + ".serving.knative.dev/progress-deadline"},
		{"progress-deadline word", ann(AnnotationProgressDeadline, "soon"), "invalid value: soon: " + anns + ".serving.knative.dev/progress-deadline"},

		// Given revision names.
		{"revision name", func(s *Service) { s.Spec.Template.Name = "hello-two" }, ""},
		{"revision name without prefix", func(s *Service) { s.Spec.Template.Name = "two" }, `invalid value: "two" must have prefix "hello-": spec.template.metadata.name`},
		{"revision name that is only a prefix", func(s *Service) { s.Spec.Template.Name = "hello-" }, "not a DNS 1035 label: [" + label1035 + "]: spec.template.metadata.name"},
		{"revision name with 300 characters", func(s *Service) { s.Spec.Template.Name = "hello-" + long }, "not a DNS 1035 label: [must be no more than 63 characters]: spec.template.metadata.name"},
		{"revision name under generateName", func(s *Service) { s.Name, s.GenerateName, s.Spec.Template.Name = "", "hello-", "hello-two" }, "must not set the field(s): spec.template.metadata.name"},

		// Time-outs and concurrency.
		{"timeoutSeconds 600", func(s *Service) { s.Spec.Template.Spec.TimeoutSeconds = ptr(int64(600)) }, ""},
		{"timeoutSeconds 601", func(s *Service) { s.Spec.Template.Spec.TimeoutSeconds = ptr(int64(601)) }, "expected 0 <= 601 <= 600: " + pod + ".timeoutSeconds"},
		{"timeoutSeconds negative", func(s *Service) { s.Spec.Template.Spec.TimeoutSeconds = ptr(int64(-1)) }, "expected 0 <= -1 <= 600: " + pod + ".timeoutSeconds"},
		{"responseStart over timeout", func(s *Service) {
			s.Spec.Template.Spec.TimeoutSeconds, s.Spec.Template.Spec.ResponseStartTimeoutSeconds = ptr(int64(10)), ptr(int64(11))
		}, "expected 0 <= 11 <= 10: " + pod + ".responseStartTimeoutSeconds"},
		{"idle negative", func(s *Service) { s.Spec.Template.Spec.IdleTimeoutSeconds = ptr(int64(-1)) }, "expected 0 <= -1 <= 300: " + pod + ".idleTimeoutSeconds"},
		{"containerConcurrency 1000", func(s *Service) { s.Spec.Template.Spec.ContainerConcurrency = ptr(int64(1000)) }, ""},
		{"containerConcurrency 1001", func(s *Service) { s.Spec.Template.Spec.ContainerConcurrency = ptr(int64(1001)) }, "expected 0 <= 1001 <= 1000: " + pod + ".containerConcurrency"},
		{"containerConcurrency negative", func(s *Service) { s.Spec.Template.Spec.ContainerConcurrency = ptr(int64(-5)) }, "expected 0 <= -5 <= 1000: " + pod + ".containerConcurrency"},

		// Containers.
		{"no containers", func(s *Service) { s.Spec.Template.Spec.Containers = nil }, "missing field(s): " + pod + ".containers"},
		{"no image", image(""), "missing field(s): " + con + ".image"},
		{"image spaces", image("a b"), `Failed to parse image reference: ` + con + `.image (image: "a b", error: a repository name has up to 255 lower case letters, digits, '-', '_' and '.', in parts joined by '/')`},
		{"image digest", image("a@sha256:12"), `Failed to parse image reference: ` + con + `.image (image: "a@sha256:12", error: a digest is sha256: and 64 lower case hexadecimal digits)`},
		{"image tag", image("a:"), `Failed to parse image reference: ` + con + `.image (image: "a:", error: a tag has 1 to 128 letters, digits, '_', '-' or '.' and begins with none of the last two)`},
		{"image scheme", image("http://x/y"), `Failed to parse image reference: ` + con + `.image (image: "http://x/y", error: unknown scheme "http": expected exec://, pkg:// or an image reference without a scheme)`},
		{"image exec relative", image("exec://bin/x"), `Failed to parse image reference: ` + con + `.image (image: "exec://bin/x", error: exec:// is followed by the absolute path of a program, so that there are three slashes)`},
		{"image exec", image("exec:///usr/bin/python3"), ""},
		{"image exec digest", image("exec:///usr/bin/x@sha256:" + strings.Repeat("0", 64)), ""},
		{"image pkg", image("pkg://sha256:" + strings.Repeat("a", 64)), ""},
		{"image pkg short", image("pkg://sha256:aa"), `Failed to parse image reference: ` + con + `.image (image: "pkg://sha256:aa", error: pkg:// is followed by sha256: and 64 lower case hexadecimal digits)`},
		{"image registry port", image("localhost:5000/a/b:v1@sha256:" + strings.Repeat("0", 64)), ""},
		{"image IPv6", image("[::1]:5000/a"), ""},
		{"image newline", image("exec:///a\nb"), `Failed to parse image reference: ` + con + `.image (image: "exec:///a\nb", error: must not contain control characters)`},
		{"container name", func(s *Service) { container(s).Name = "queue-proxy" }, `"queue-proxy" is a reserved container name: ` + con + ".name"},
		{"container name dots", func(s *Service) { container(s).Name = "a.b" }, "invalid value: a.b: " + con + ".name (" + label1123 + ")"},
		{"NUL in args", func(s *Service) { container(s).Args = []string{"a", "b\x00c"} }, "must not contain NUL (byte 1): " + con + ".args[1]"},
		{"imagePullPolicy", func(s *Service) { container(s).ImagePullPolicy = "always" }, "invalid value: always: " + con + ".imagePullPolicy (expected Always, IfNotPresent, Never)"},
		{"terminationMessagePolicy", func(s *Service) { container(s).TerminationMessagePolicy = "x" }, "invalid value: x: " + con + ".terminationMessagePolicy (expected File, FallbackToLogsOnError)"},

		// Several containers.
		{"two containers", two(Container{Image: "a", Ports: []ContainerPort{{}}}, Container{Image: "b", Env: []EnvVar{{Name: "PORT", Value: "1"}}}), ""},
		{"two containers without port", two(Container{Image: "a"}, Container{Image: "b"}), "missing field(s): " + pod + ".containers[*].ports"},
		{"two ports", two(Container{Image: "a", Ports: []ContainerPort{{ContainerPort: 1}}}, Container{Image: "b", Ports: []ContainerPort{{ContainerPort: 2}}}),
			"more than one container port is set: " + pod + ".containers[*].ports (Only a single port is allowed across all containers)"},
		{"same names", two(Container{Name: "x", Image: "a", Ports: []ContainerPort{{}}}, Container{Name: "x", Image: "b"}), `duplicate container name "x": ` + pod + ".containers[1].name"},
		{"sidecar probe", two(Container{Image: "a", Ports: []ContainerPort{{}}}, Container{Image: "b", LivenessProbe: &Probe{}}), "must not set the field(s): " + pod + ".containers[1].livenessProbe"},
		{"several images missing", two(Container{Ports: []ContainerPort{{}}}, Container{}), "missing field(s): " + pod + ".containers[0].image, " + pod + ".containers[1].image"},

		// Ports.
		{"h2c", port(ContainerPort{Name: "h2c"}), ""},
		{"port name", port(ContainerPort{Name: "grpc"}), "Port name grpc is not allowed: " + con + ".ports[0] (Name must be empty, or one of: 'h2c', 'http1')"},
		{"reserved port", port(ContainerPort{ContainerPort: 8012}), "invalid value: 8012 is a reserved port: " + con + ".ports[0].containerPort (please use a different value)"},
		{"reserved port 8112", port(ContainerPort{ContainerPort: 8112}), "invalid value: 8112 is a reserved port: " + con + ".ports[0].containerPort (please use a different value)"},
		{"port range", port(ContainerPort{ContainerPort: 65536}), "expected 0 <= 65536 <= 65535: " + con + ".ports[0].containerPort"},
		{"port UDP", port(ContainerPort{Protocol: "UDP"}), "invalid value: UDP: " + con + ".ports[0].protocol"},
		{"two ports in one container", port(ContainerPort{ContainerPort: 1}, ContainerPort{ContainerPort: 2}),
			"more than one container port is set: " + pod + ".containers[*].ports (Only a single port is allowed across all containers)"},

		// Environment.
		{"env PORT", env(EnvVar{Name: "PORT"}), `"PORT" is a reserved environment variable: ` + con + ".env[0].name"},
		{"env K_SERVICE", env(EnvVar{Name: "A"}, EnvVar{Name: "K_SERVICE"}), `"K_SERVICE" is a reserved environment variable: ` + con + ".env[1].name"},
		{"env K_CONFIGURATION", env(EnvVar{Name: "K_CONFIGURATION"}), `"K_CONFIGURATION" is a reserved environment variable: ` + con + ".env[0].name"},
		{"env K_REVISION", env(EnvVar{Name: "K_REVISION"}), `"K_REVISION" is a reserved environment variable: ` + con + ".env[0].name"},
		{"env without name", env(EnvVar{Value: "x"}), "missing field(s): " + con + ".env[0].name"},
		{"env NUL", env(EnvVar{Name: "A", Value: "\x00"}), "must not contain NUL (byte 0): " + con + ".env[0].value"},
		{"env value and valueFrom", env(EnvVar{Name: "A", Value: "x", ValueFrom: raw(`{"secretKeyRef":{}}`)}), "may not be specified when `value` is not empty: " + con + ".env[0].valueFrom"},
		{"env fieldRef", env(EnvVar{Name: "A", ValueFrom: raw(`{"fieldRef":{"fieldPath":"x"}}`)}), "must not set the field(s): " + con + ".env[0].valueFrom.fieldRef"},
		{"env valueFrom list", env(EnvVar{Name: "A", ValueFrom: raw(`[]`)}), "invalid value: []: " + con + ".env[0].valueFrom (expected an object)"},

		// Resources.
		{"quantities", resources("64Mi", "1e3"), ""},
		{"quantity", resources("64MB", "1"), "invalid value: 64MB: " + con + ".resources.limits[memory] (" + ErrQuantity.Error() + ")"},
		{"negative quantity", resources("1", "-1"), "invalid value: -1: " + con + ".resources.requests[memory] (must be greater than or equal to 0)"},
		{"request over limit", resources("1Gi", "2Gi"), "invalid value: 2Gi: " + con + ".resources.requests[memory] (must be less than or equal to memory limit of 1Gi)"},

		// Probes.
		{"http probe", readiness(Probe{HTTPGet: &HTTPGetAction{Path: "/healthz"}}), ""},
		{"http probe by name", readiness(Probe{HTTPGet: &HTTPGetAction{Port: IntOrString{String: "http"}}}), ""},
		{"grpc probe", readiness(Probe{GRPC: &GRPCAction{}}), ""},
		{"period gets its defaults", readiness(Probe{PeriodSeconds: 5}), ""},
		{"liveness without handler", liveness(Probe{}), "expected exactly one, got neither: " + con + ".livenessProbe.exec, " + con + ".livenessProbe.grpc, " + con + ".livenessProbe.httpGet, " + con + ".livenessProbe.tcpSocket"},
		{"two handlers", readiness(Probe{HTTPGet: &HTTPGetAction{}, TCPSocket: &TCPSocketAction{}}), "expected exactly one, got both: " + con + ".readinessProbe.httpGet, " + con + ".readinessProbe.tcpSocket"},
		{"probe port", readiness(Probe{HTTPGet: &HTTPGetAction{Port: IntOrString{Int: 9999}}}), "invalid value: 9999: " + con + ".readinessProbe.httpGet.port (Probe port must match container port)"},
		{"probe port name", liveness(Probe{TCPSocket: &TCPSocketAction{Port: IntOrString{String: "imap"}}}), "invalid value: imap: " + con + ".livenessProbe.tcpSocket.port (Probe port must match container port)"},
		{"probe path", readiness(Probe{HTTPGet: &HTTPGetAction{Path: "healthz"}}), "invalid value: healthz: " + con + ".readinessProbe.httpGet.path (must begin with '/' and have no spaces or control characters)"},
		{"probe path smuggles", readiness(Probe{HTTPGet: &HTTPGetAction{Path: "/ HTTP/1.1\r\nX: y"}}), "invalid value: / HTTP/1.1\r\nX: y: " + con + ".readinessProbe.httpGet.path (must begin with '/' and have no spaces or control characters)"},
		{"probe header", readiness(Probe{HTTPGet: &HTTPGetAction{HTTPHeaders: []HTTPHeader{{Name: "a b", Value: "c\n"}}}}),
			"invalid value: a b: " + con + ".readinessProbe.httpGet.httpHeaders[0].name (must be the name of an HTTP header); invalid value: c\n: " + con + ".readinessProbe.httpGet.httpHeaders[0].value (must be one line)"},
		{"probe host", readiness(Probe{HTTPGet: &HTTPGetAction{Host: "a/b"}}), "invalid value: a/b: " + con + ".readinessProbe.httpGet.host (must be usable as a Host header)"},
		{"probe scheme", readiness(Probe{HTTPGet: &HTTPGetAction{Scheme: "ftp"}}), "invalid value: ftp: " + con + ".readinessProbe.httpGet.scheme (expected HTTP, HTTPS)"},
		{"probe exec", readiness(Probe{Exec: &ExecAction{}}), "missing field(s): " + con + ".readinessProbe.exec.command"},
		{"probe failureThreshold", readiness(Probe{FailureThreshold: 2}), "failureThreshold is disallowed when periodSeconds is zero: " + con + ".readinessProbe.failureThreshold"},
		{"probe timeoutSeconds", readiness(Probe{TimeoutSeconds: 2}), "timeoutSeconds is disallowed when periodSeconds is zero: " + con + ".readinessProbe.timeoutSeconds"},
		{"probe ranges", readiness(Probe{PeriodSeconds: 1, TimeoutSeconds: -1, FailureThreshold: -1, SuccessThreshold: -1, InitialDelaySeconds: -1}),
			"expected 1 <= -1 <= 2147483647: " + con + ".readinessProbe.failureThreshold, " + con + ".readinessProbe.successThreshold, " + con + ".readinessProbe.timeoutSeconds; expected 0 <= -1 <= 2147483647: " + con + ".readinessProbe.initialDelaySeconds"},
		{"probe period", readiness(Probe{PeriodSeconds: -1, TimeoutSeconds: 1, FailureThreshold: 1}), "expected 0 <= -1 <= 2147483647: " + con + ".readinessProbe.periodSeconds"},
		{"liveness successThreshold", liveness(Probe{TCPSocket: &TCPSocketAction{}, SuccessThreshold: 2}), "invalid value: 2: " + con + ".livenessProbe.successThreshold (must be 1)"},
		{"readiness grace", readiness(Probe{TerminationGracePeriodSeconds: ptr(int64(1))}), "must not set the field(s): " + con + ".readinessProbe.terminationGracePeriodSeconds"},

		// What is kept without effect is still checked.
		{"volumes", func(s *Service) {
			s.Spec.Template.Spec.Volumes = raw(`[{"name":"v","emptyDir":{}}]`)
			container(s).VolumeMounts = raw(`[{"name":"v","mountPath":"/data"}]`)
		}, ""},
		{"volumes no list", func(s *Service) { s.Spec.Template.Spec.Volumes = raw(`{"a":1}`) }, `invalid value: {"a":1}: ` + pod + ".volumes (expected a list of objects)"},
		{"volume not mounted", func(s *Service) { s.Spec.Template.Spec.Volumes = raw(`[{"name":"v"}]`) }, `volume with name "v" not mounted: ` + pod + ".volumes[0].name"},
		{"mount without volume", func(s *Service) { container(s).VolumeMounts = raw(`[{"name":"v","mountPath":"/dev/"}]`) },
			`mountPath "/dev" is a reserved path: ` + con + ".volumeMounts[0].mountPath; volumeMount has no matching volume: " + con + ".volumeMounts[0].name"},
		{"privileged", func(s *Service) { container(s).SecurityContext = raw(`{"privileged":true,"runAsUser":-1}`) },
			"must not set the field(s): " + con + ".securityContext.privileged; expected 0 <= -1 <= 2147483647: " + con + ".securityContext.runAsUser"},
		{"service account", func(s *Service) { s.Spec.Template.Spec.ServiceAccountName = "A" }, "invalid value: A: " + pod + ".serviceAccountName (" + subdomain + ")"},
		{"account token", func(s *Service) { s.Spec.Template.Spec.AutomountServiceAccountToken = ptr(true) }, "must not set the field(s): " + pod + ".automountServiceAccountToken"},

		// Traffic.
		{"split", traffic(latest(20), tagged("old", pinned("hello-00001", 80))), ""},
		{"tag without percent", traffic(latest(100), tagged("old", TrafficTarget{RevisionName: "hello-00001"})), ""},
		{"sum 90", traffic(latest(90)), "Traffic targets sum to 90, want 100: spec.traffic"},
		{"sum 110", traffic(latest(100), pinned("hello-00001", 10)), "Traffic targets sum to 110, want 100: spec.traffic"},
		{"percent range", traffic(latest(-1), pinned("hello-00001", 101)), "expected 0 <= -1 <= 100: spec.traffic[0].percent; expected 0 <= 101 <= 100: spec.traffic[1].percent"},
		{"huge percent", traffic(latest(1<<62), latest(1<<62)),
			"Traffic targets sum to 2000, want 100: spec.traffic; expected 0 <= 4611686018427387904 <= 100: spec.traffic[0].percent, spec.traffic[1].percent"},
		{"configurationName", traffic(TrafficTarget{ConfigurationName: "x", Percent: ptr(int64(100))}), "must not set the field(s): spec.traffic[0].configurationName"},
		{"latestRevision and name", traffic(TrafficTarget{RevisionName: "x", LatestRevision: ptr(true), Percent: ptr(int64(100))}), `may not set revisionName "x" when latestRevision is true: spec.traffic[0].latestRevision`},
		{"neither", traffic(TrafficTarget{LatestRevision: ptr(false), Percent: ptr(int64(100))}), `may not set revisionName "" when latestRevision is false: spec.traffic[0].latestRevision`},
		{"revision name", traffic(pinned("A", 100)), `invalid key name "A": spec.traffic[0].revisionName (` + label1035 + ")"},
		{"duplicate tag", traffic(tagged("a", latest(50)), tagged("a", pinned("hello-00001", 50))), `Multiple definitions for "a": spec.traffic[0].tag, spec.traffic[1].tag`},
		{"tag syntax", traffic(tagged("1a", latest(100))), "invalid value: not a DNS 1035 label: [" + label1035 + "]: spec.traffic[0].tag"},
		{"tag host too long", traffic(tagged(label63[:58], latest(100))), "invalid value: " + label63[:58] + `: spec.traffic[0].tag (the host label "` + label63[:58] + `-hello" has 64 characters, more than 63)`},
		{"url", traffic(TrafficTarget{URL: "http://x", Percent: ptr(int64(100))}), "must not set the field(s): spec.traffic[0].url"},

		// The autoscaler.
		{"all of them", scale("class", ScalingClassKPA, "metric", "rps", "metric-aggregation-algorithm", "weighted-exponential", "min-scale", "1", "max-scale", "9",
			"initial-scale", "0", "activation-scale", "2", "scale-down-delay", "15m", "scale-to-zero-pod-retention-period", "1m5s", "target", "0.01",
			"target-utilization-percentage", "100", "target-burst-capacity", "-1", "window", "6s", "panic-window-percentage", "1.5", "panic-threshold-percentage", "110"), ""},
		{"camelCase", scale("minScale", "1", "maxScale", "9", "initialScale", "0", "activationScale", "2", "targetBurstCapacity", "0", "panicThresholdPercentage", "1000"), ""},
		{"class hpa", scale("class", ScalingClassHPA), "invalid value: hpa.autoscaling.knative.dev: " + auto + "class (the only class is kpa.autoscaling.knative.dev)"},
		{"class unknown", scale("class", "mine"), "invalid value: mine: " + auto + "class (the only class is kpa.autoscaling.knative.dev)"},
		{"metric cpu", scale("metric", "cpu"), "invalid value: cpu: " + auto + "metric"},
		{"aggregation", scale("metric-aggregation-algorithm", "median"), "invalid value: median: " + auto + "metric-aggregation-algorithm"},
		{"min-scale word", scale("min-scale", "one"), "invalid value: one: " + auto + "min-scale"},
		{"min-scale negative", scale("min-scale", "-1"), "expected 0 <= -1 <= 2147483647: " + auto + "min-scale"},
		{"minScale huge", scale("minScale", "99999999999"), "expected 0 <= 99999999999 <= 2147483647: " + auto + "minScale"},
		{"max below min", scale("max-scale", "1", "minScale", "2"), "max-scale=1 is less than min-scale=2: " + auto + "max-scale, " + auto + "minScale"},
		{"max 0 is no bound", scale("max-scale", "0", "min-scale", "2"), ""},
		{"initial-scale negative", scale("initial-scale", "-1"), "expected 0 <= -1 <= 2147483647: " + auto + "initial-scale"},
		{"activation-scale 1", scale("activation-scale", "1"), "expected 2 <= 1 <= 2147483647: " + auto + "activation-scale"},
		{"activation-scale over max", scale("activation-scale", "5", "max-scale", "4"), "max-scale=4 is less than activation-scale=5: " + auto + "activation-scale"},
		{"target", scale("target", "0"), "target 0 should be at least 0.01: " + auto + "target"},
		{"target NaN", scale("target", "NaN"), "invalid value: NaN: " + auto + "target"},
		{"utilization", scale("target-utilization-percentage", "0"), "expected 1 <= 0 <= 100: " + auto + "target-utilization-percentage"},
		{"burst capacity", scale("target-burst-capacity", "-2"), "invalid value: -2: " + auto + "target-burst-capacity"},
		{"burst capacity Inf", scale("target-burst-capacity", "Inf"), "invalid value: Inf: " + auto + "target-burst-capacity"},
		{"window short", scale("window", "5s"), "expected 6s <= 5s <= 1h0m0s: " + auto + "window"},
		{"window long", scale("window", "61m"), "expected 6s <= 61m <= 1h0m0s: " + auto + "window"},
		{"window precision", scale("window", "6500ms"), "must be specified with at most second precision: " + auto + "window"},
		{"window number", scale("window", "60"), "invalid value: 60: " + auto + "window"},
		{"panic window", scale("panic-window-percentage", "0.5"), "expected 1 <= 0.5 <= 100: " + auto + "panic-window-percentage"},
		{"panic threshold", scale("panic-threshold-percentage", "109"), "expected 110 <= 109 <= 1000: " + auto + "panic-threshold-percentage"},
		{"scale-down-delay", scale("scale-down-delay", "2h"), "expected 0s <= 2h <= 1h0m0s: " + auto + "scale-down-delay"},
		{"scale-down-delay precision", scale("scale-down-delay", "1ms"), "must be specified with at most second precision: " + auto + "scale-down-delay"},
		{"retention", scale("scale-to-zero-pod-retention-period", "-1s"), "expected 0s <= -1s <= 1h0m0s: " + auto + "scale-to-zero-pod-retention-period"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := good()
			tt.edit(s)
			SetDefaults(s)
			errs := Validate(s, nil, DefaultLimits)
			if got := errs.Error(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if (errs.Err() == nil) != (tt.want == "") {
				t.Errorf("Err() = %v", errs.Err())
			}
			for _, e := range errs {
				if e.Type == "" || e.Field == "" || e.Detail == "" {
					t.Errorf("incomplete error %#v", e)
				}
			}
		})
	}
}

func TestValidateLimits(t *testing.T) {
	l := Limits{MaxTimeoutSeconds: 3600, MaxConcurrency: 5000, MaxScale: 10}
	for _, tt := range []struct {
		name string
		edit func(*Service)
		want string
	}{
		{"timeout raised", func(s *Service) { s.Spec.Template.Spec.TimeoutSeconds = ptr(int64(3600)) }, ""},
		{"timeout over", func(s *Service) { s.Spec.Template.Spec.TimeoutSeconds = ptr(int64(3601)) }, "expected 0 <= 3601 <= 3600: " + pod + ".timeoutSeconds"},
		{"concurrency raised", func(s *Service) { s.Spec.Template.Spec.ContainerConcurrency = ptr(int64(5000)) }, ""},
		{"max-scale over", scale("max-scale", "11"), "expected 1 <= 11 <= 10: " + auto + "max-scale"},
		{"max-scale unlimited", scale("max-scale", "0"), "max-scale=0 (unlimited), must be less than 10: " + auto + "max-scale"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := good()
			tt.edit(s)
			SetDefaults(s)
			if got := Validate(s, nil, l).Error(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
	s := good()
	SetDefaults(s)
	if errs := Validate(s, nil, Limits{}); errs != nil {
		t.Errorf("no limits given: %v", errs)
	}
	s.Spec.Template.Spec.TimeoutSeconds = ptr(int64(601))
	if errs := Validate(s, nil, Limits{}); len(errs) != 1 {
		t.Errorf("no limits given: %v", errs)
	}
}

func TestValidateNameChange(t *testing.T) {
	stored := good()
	stored.Spec.Template.Name = "hello-one"
	SetDefaults(stored)
	for _, tt := range []struct {
		name string
		edit func(*Service)
		want string
	}{
		{"nothing changed", func(*Service) {}, ""},
		{"traffic changed", traffic(tagged("a", latest(100))), ""},
		{"name changed", func(s *Service) { s.Spec.Template.Name = "hello-two"; container(s).Image = "b" }, ""},
		{"name removed", func(s *Service) { s.Spec.Template.Name = ""; container(s).Image = "b" }, ""},
		{"image changed", image("b"), `Saw the following changes without a name change (-old +new): spec.template.metadata.name (spec.containers[0].image: -"dev.local/hello" +"b")`},
		{"annotation added", ann("a", "b"), `Saw the following changes without a name change (-old +new): spec.template.metadata.name (metadata.annotations: +{"a":"b"})`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := DeepCopy(stored)
			tt.edit(s)
			SetDefaults(s)
			if got := Validate(s, stored, DefaultLimits).Error(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			c := &Configuration{ObjectMeta: s.ObjectMeta, Spec: s.Spec.ConfigurationSpec}
			was := &Configuration{ObjectMeta: stored.ObjectMeta, Spec: stored.Spec.ConfigurationSpec}
			if got := Validate(c, was, DefaultLimits).Error(); got != tt.want {
				t.Errorf("configuration: got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestValidateRevisionIsImmutable(t *testing.T) {
	stored := &Revision{ObjectMeta: ObjectMeta{Name: "hello-00001", Namespace: "default"}}
	stored.Spec.Containers = []Container{{Image: "a", Env: []EnvVar{{Name: "A", Value: "1"}}}}
	stored.Spec.TimeoutSeconds = ptr(int64(900)) // stored when the limit was higher
	SetDefaults(stored)

	same := DeepCopy(stored)
	same.Labels = map[string]string{LabelRoutingState: RoutingStateActive}
	if errs := Validate(same, stored, DefaultLimits); errs != nil {
		t.Errorf("labels may change: %v", errs)
	}

	changed := DeepCopy(stored)
	changed.Spec.Containers[0].Env[0].Value = "2"
	changed.Spec.IdleTimeoutSeconds = ptr(int64(5))
	want := `Immutable fields changed (-old +new): spec (spec.containers[0].env[0].value: -"1" +"2"; spec.idleTimeoutSeconds: +5)`
	if got := Validate(changed, stored, DefaultLimits).Error(); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}

	// An object that an older release stored lacks defaults of today; sending it back with them is no change.
	bare := DeepCopy(stored)
	bare.Spec.EnableServiceLinks, bare.Spec.ResponseStartTimeoutSeconds = nil, nil
	if errs := Validate(stored, bare, DefaultLimits); errs != nil {
		t.Errorf("new defaults are no change: %v", errs)
	}

	// A new one is measured.
	if got, want := Validate(stored, nil, DefaultLimits).Error(), "expected 0 <= 900 <= 600: spec.timeoutSeconds"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	withScale := DeepCopy(stored)
	withScale.Annotations = map[string]string{"autoscaling.knative.dev/min-scale": "x"}
	if got, want := Validate(withScale, stored, DefaultLimits).Error(), "invalid value: x: metadata.annotations.autoscaling.knative.dev/min-scale"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestValidateRoute(t *testing.T) {
	for _, tt := range []struct {
		name    string
		traffic []TrafficTarget
		want    string
	}{
		{"configuration", []TrafficTarget{{ConfigurationName: "hello", Percent: ptr(int64(100))}}, ""},
		{"revision", []TrafficTarget{pinned("hello-00001", 100)}, ""},
		{"none", nil, "Traffic targets sum to 0, want 100: spec.traffic"},
		{"both", []TrafficTarget{{ConfigurationName: "hello", RevisionName: "hello-00001", Percent: ptr(int64(100))}},
			"expected exactly one, got both: spec.traffic[0].configurationName, spec.traffic[0].revisionName"},
		{"neither", []TrafficTarget{latest(100)}, "expected exactly one, got neither: spec.traffic[0].configurationName, spec.traffic[0].revisionName"},
		{"bad configuration", []TrafficTarget{{ConfigurationName: "a/b", Percent: ptr(int64(100))}}, `invalid key name "a/b": spec.traffic[0].configurationName (` + label1035 + ")"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &Route{ObjectMeta: ObjectMeta{Name: "hello", Namespace: "default"}, Spec: RouteSpec{Traffic: tt.traffic}}
			SetDefaults(r)
			if got := Validate(r, nil, DefaultLimits).Error(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

func TestValidateDomainMapping(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*DomainMapping)
		want string
	}{
		{"good", func(*DomainMapping) {}, ""},
		{"one label", func(d *DomainMapping) { d.Name = "example" }, "invalid value: example: metadata.name (should be a domain with at least two segments separated by dots)"},
		{"upper case", func(d *DomainMapping) { d.Name = "My.example.com" }, "invalid value: My.example.com: metadata.name (" + subdomain + ")"},
		{"wildcard", func(d *DomainMapping) { d.Name = "*.example.com" }, "invalid value: *.example.com: metadata.name (" + subdomain + ")"},
		{"port", func(d *DomainMapping) { d.Name = "example.com:80" }, "invalid value: example.com:80: metadata.name (" + subdomain + ")"},
		{"no name", func(d *DomainMapping) { d.Name = "" }, "invalid value: : metadata.name (" + subdomain + ")"},
		{"300 characters", func(d *DomainMapping) { d.Name = strings.Repeat("abcdefghi.", 30) + "com" },
			"invalid value: " + strings.Repeat("abcdefghi.", 20) + "...: metadata.name (must be no more than 253 characters)"},
		{"long label", func(d *DomainMapping) { d.Name = strings.Repeat("x", 64) + ".com" }, "invalid value: " + strings.Repeat("x", 64) + ".com: metadata.name (each segment of the domain must be no more than 63 characters)"},
		{"inside", func(d *DomainMapping) { d.Name = "hello.default.svc.cluster.local" }, `invalid value: hello.default.svc.cluster.local: metadata.name (must not be a subdomain of cluster local domain "svc.cluster.local")`},
		{"generateName", func(d *DomainMapping) { d.GenerateName = "x-" }, "must not set the field(s): metadata.generateName"},
		{"no ref", func(d *DomainMapping) { d.Spec.Ref = Reference{} }, "missing field(s): spec.ref.apiVersion, spec.ref.kind, spec.ref.name"},
		{"ref namespace", func(d *DomainMapping) { d.Spec.Ref.Namespace = "other" }, `mismatched namespaces: spec.ref.namespace (parent namespace: "default" does not match ref: "other")`},
		{"ref kind", func(d *DomainMapping) { d.Spec.Ref.Kind = "Broker" }, "invalid value: Broker: spec.ref.kind (only Service is supported)"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := &DomainMapping{ObjectMeta: ObjectMeta{Name: "my.example.com", Namespace: "default"}}
			d.Spec.Ref = Reference{Kind: "Service", APIVersion: ServingV1, Name: "hello"}
			tt.edit(d)
			SetDefaults(d)
			if got := Validate(d, nil, DefaultLimits).Error(); got != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
		})
	}
}

// Causes are made of single errors, so that each has one field.
func TestErrorsKeepOneFieldEach(t *testing.T) {
	s := good()
	s.Spec.Template.Spec.Containers = nil
	s.Spec.Traffic = []TrafficTarget{latest(90)}
	SetDefaults(s)
	got := Validate(s, nil, DefaultLimits)
	want := Errors{
		{Type: FieldValueRequired, Field: pod + ".containers", Detail: "missing field(s)"},
		{Type: FieldValueInvalid, Field: "spec.traffic", Detail: "Traffic targets sum to 90, want 100"},
	}
	if len(got) != 2 || got[0] != want[0] || got[1] != want[1] {
		t.Errorf("got %#v", got)
	}
	if got[0].Error() != "missing field(s): "+pod+".containers" {
		t.Errorf("got %s", got[0].Error())
	}
}
