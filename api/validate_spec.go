package api

import (
	"encoding/json"
	"fmt"
	"math"
	"path"
	"slices"
	"strings"
)

// Names that the platform keeps for itself.
var (
	reservedEnv        = []string{"PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION"}
	reservedContainers = []string{"queue-proxy"}
	reservedPaths      = []string{"/", "/dev", "/dev/log"}
	// Of the queue-proxy: requests (8012 HTTP/1 and h2c, 8013 h2c, 8112 TLS), 8022 admin, 9090 and 9091 metrics, 8008 profiling.
	reservedPorts = []int32{8008, 8012, 8013, 8022, 8112, 9090, 9091}
)

// revisionSpec checks the spec of a revision or of a template.
func (v validator) revisionSpec(r report, s *RevisionSpec) {
	v.timeouts(r, s)
	if c := s.ContainerConcurrency; c != nil && (*c < 0 || *c > v.limits.MaxConcurrency) {
		r.at("containerConcurrency").bounds(*c, 0, v.limits.MaxConcurrency)
	}
	if s.ServiceAccountName != "" {
		r.at("serviceAccountName").wrongs(s.ServiceAccountName, checkSubdomain(s.ServiceAccountName))
	}
	if t := s.AutomountServiceAccountToken; t != nil && *t {
		r.at("automountServiceAccountToken").forbidden()
	}
	v.list(r.at("imagePullSecrets"), s.ImagePullSecrets)
	volumes := v.volumes(r.at("volumes"), s)
	v.containers(r, s, volumes)
}

func (v validator) timeouts(r report, s *RevisionSpec) {
	total := v.limits.MaxTimeoutSeconds
	if t := s.TimeoutSeconds; t != nil {
		if *t < 0 || *t > v.limits.MaxTimeoutSeconds {
			r.at("timeoutSeconds").bounds(*t, 0, v.limits.MaxTimeoutSeconds)
		}
		if *t > 0 {
			total = *t
		}
	}
	for _, f := range []struct {
		name  string
		value *int64
	}{
		{"responseStartTimeoutSeconds", s.ResponseStartTimeoutSeconds},
		{"idleTimeoutSeconds", s.IdleTimeoutSeconds},
	} {
		if f.value != nil && (*f.value < 0 || *f.value > total) {
			r.at(f.name).bounds(*f.value, 0, total)
		}
	}
}

func (v validator) containers(r report, s *RevisionSpec, volumes map[string]bool) {
	if len(s.Containers) == 0 {
		r.at("containers").missing()
		return
	}
	ports := 0
	for i := range s.Containers {
		ports += len(s.Containers[i].Ports)
	}
	switch {
	case ports == 0 && len(s.Containers) > 1:
		r.at("containers[*].ports").missing()
	case ports > 1:
		r.at("containers[*].ports").add(FieldValueInvalid, "more than one container port is set", "Only a single port is allowed across all containers")
	}
	names := map[string]bool{}
	for i := range s.Containers {
		c := &s.Containers[i]
		at := r.index("containers", i)
		if names[c.Name] {
			at.at("name").add(FieldValueDuplicate, fmt.Sprintf("duplicate container name %q", shorten(c.Name)), "")
		}
		names[c.Name] = true
		v.container(at, c, len(s.Containers) == 1 || len(c.Ports) > 0, volumes)
	}
}

func (v validator) container(r report, c *Container, serving bool, volumes map[string]bool) {
	v.containerName(r.at("name"), c.Name)
	if c.Image == "" {
		r.at("image").missing()
	} else if wrong := checkImage(c.Image); wrong != "" {
		r.at("image").add(FieldValueInvalid, "Failed to parse image reference", fmt.Sprintf("image: %q, error: %s", shorten(c.Image), wrong))
	}
	v.commandLine(r, c)
	v.ports(r.at("ports"), c.Ports)
	v.env(r, c.Env, serving)
	v.list(r.at("envFrom"), c.EnvFrom)
	v.resources(r.at("resources"), &c.Resources)
	v.probes(r, c, serving)
	v.mounts(r.at("volumeMounts"), c.VolumeMounts, volumes)
	v.securityContext(r.at("securityContext"), c.SecurityContext)
	oneOf(r.at("imagePullPolicy"), c.ImagePullPolicy, "Always", "IfNotPresent", "Never")
	oneOf(r.at("terminationMessagePolicy"), c.TerminationMessagePolicy, "File", "FallbackToLogsOnError")
}

// oneOf accepts the empty value, too.
func oneOf(r report, value string, values ...string) {
	if value != "" && !slices.Contains(values, value) {
		r.add(FieldValueNotSupported, fmt.Sprintf("invalid value: %s", shorten(value)), "expected "+strings.Join(values, ", "))
	}
}

func (v validator) containerName(r report, name string) {
	if slices.Contains(reservedContainers, name) {
		r.generic(fmt.Sprintf("%q is a reserved container name", name))
	} else if name != "" {
		r.wrongs(name, checkDNS1123(name))
	}
}

// commandLine refuses what no process can be started with.
func (v validator) commandLine(r report, c *Container) {
	for _, f := range []struct {
		name   string
		values []string
	}{{"command", c.Command}, {"args", c.Args}} {
		for i, s := range f.values {
			noNUL(r.index(f.name, i), s)
		}
	}
	noNUL(r.at("workingDir"), c.WorkingDir)
}

// noNUL refuses NUL: command lines and environments end there.
func noNUL(r report, s string) {
	if i := strings.IndexByte(s, 0); i >= 0 {
		r.generic(fmt.Sprintf("must not contain NUL (byte %d)", i))
	}
}

func (v validator) ports(r report, ports []ContainerPort) {
	for i := range ports {
		p := &ports[i]
		at := report{r.errs, fmt.Sprintf("%s[%d]", r.path, i)}
		if p.Protocol != "" && p.Protocol != "TCP" {
			at.at("protocol").invalid(p.Protocol)
		}
		if slices.Contains(reservedPorts, p.ContainerPort) {
			at.at("containerPort").invalidWhy(fmt.Sprintf("%d is a reserved port", p.ContainerPort), "please use a different value")
		}
		if p.ContainerPort < 0 || p.ContainerPort > math.MaxUint16 {
			at.at("containerPort").bounds(p.ContainerPort, 0, math.MaxUint16)
		}
		if p.Name != "" && p.Name != ProtocolH2C && p.Name != ProtocolHTTP1 {
			at.add(FieldValueNotSupported, fmt.Sprintf("Port name %s is not allowed", shorten(p.Name)), "Name must be empty, or one of: 'h2c', 'http1'")
		}
	}
}

func (v validator) env(r report, env []EnvVar, serving bool) {
	for i := range env {
		e := &env[i]
		at := r.index("env", i)
		switch {
		case e.Name == "":
			at.at("name").missing()
		case slices.Contains(reservedEnv, e.Name) && (serving || e.Name != "PORT"): // a sidecar has no port of ours
			at.at("name").generic(fmt.Sprintf("%q is a reserved environment variable", e.Name))
		default:
			at.at("name").wrongs(e.Name, checkEnvName(e.Name))
		}
		noNUL(at.at("value"), e.Value)
		if len(e.ValueFrom) == 0 {
			continue
		}
		if e.Value != "" {
			at.at("valueFrom").add(FieldValueInvalid, "may not be specified when `value` is not empty", "")
		}
		v.valueFrom(at.at("valueFrom"), e.ValueFrom)
	}
}

func (v validator) valueFrom(r report, raw json.RawMessage) {
	var source map[string]json.RawMessage
	if json.Unmarshal(raw, &source) != nil {
		r.invalidWhy(string(raw), "expected an object")
		return
	}
	for _, name := range []string{"fieldRef", "resourceFieldRef"} {
		if present(source[name]) {
			r.at(name).forbidden()
		}
	}
}

// present says that a raw value is there and not null.
func present(raw json.RawMessage) bool { return len(raw) > 0 && string(raw) != "null" }

// list refuses a raw field that is no list of objects.
func (v validator) list(r report, raw json.RawMessage) []map[string]json.RawMessage {
	if !present(raw) {
		return nil
	}
	var l []map[string]json.RawMessage
	if json.Unmarshal(raw, &l) != nil {
		r.invalidWhy(string(raw), "expected a list of objects")
		return nil
	}
	return l
}

func (v validator) resources(r report, res *Resources) {
	limits := v.quantities(r.at("limits"), res.Limits)
	requests := v.quantities(r.at("requests"), res.Requests)
	for name, n := range requests {
		if limit, ok := limits[name]; ok && n > limit {
			key(r.at("requests"), name).invalidWhy(string(res.Requests[name]), fmt.Sprintf("must be less than or equal to %s limit of %s", name, res.Limits[name]))
		}
	}
}

func key(r report, name string) report { return r.at("[" + shorten(name) + "]") }

func (v validator) quantities(r report, m map[string]Quantity) map[string]float64 {
	values := map[string]float64{}
	for name, q := range m {
		if wrong := checkKey(name); wrong != nil {
			r.invalidKey(name, strings.Join(wrong, "; "))
		}
		n, err := q.Value()
		switch {
		case err != nil:
			key(r, name).invalidWhy(string(q), err.Error())
		case n < 0:
			key(r, name).invalidWhy(string(q), "must be greater than or equal to 0")
		default:
			values[name] = n
		}
	}
	return values
}

func (v validator) probes(r report, c *Container, serving bool) {
	for _, p := range []struct {
		name  string
		probe *Probe
	}{{"readinessProbe", c.ReadinessProbe}, {"livenessProbe", c.LivenessProbe}, {"startupProbe", c.StartupProbe}} {
		if p.probe == nil {
			continue
		}
		at := r.at(p.name)
		if !serving { // Knative's multi-container-probing is off by default
			at.forbidden()
			continue
		}
		v.probeHandler(at, p.probe, c)
		if p.name == "readinessProbe" {
			v.readinessTimes(at, p.probe)
		} else {
			v.livenessTimes(at, p.probe)
		}
	}
}

func (v validator) probeHandler(r report, p *Probe, c *Container) {
	var handlers []string
	if h := p.HTTPGet; h != nil {
		handlers = append(handlers, "httpGet")
		at := r.at("httpGet")
		v.probePort(at.at("port"), h.Port, c)
		if h.Path != "" && !strings.HasPrefix(h.Path, "/") || strings.ContainsFunc(h.Path, control) {
			at.at("path").invalidWhy(h.Path, "must begin with '/' and have no spaces or control characters")
		}
		oneOf(at.at("scheme"), h.Scheme, "HTTP", "HTTPS")
		if strings.ContainsFunc(h.Host, control) || strings.Contains(h.Host, "/") {
			at.at("host").invalidWhy(h.Host, "must be usable as a Host header")
		}
		for i, f := range h.HTTPHeaders {
			field := at.index("httpHeaders", i)
			if !headerName.MatchString(f.Name) {
				field.at("name").invalidWhy(f.Name, "must be the name of an HTTP header")
			}
			if strings.ContainsAny(f.Value, "\r\n\x00") {
				field.at("value").invalidWhy(f.Value, "must be one line")
			}
		}
	}
	if h := p.TCPSocket; h != nil {
		handlers = append(handlers, "tcpSocket")
		v.probePort(r.at("tcpSocket").at("port"), h.Port, c)
	}
	if h := p.Exec; h != nil {
		handlers = append(handlers, "exec")
		if len(h.Command) == 0 {
			r.at("exec").at("command").missing()
		}
		for i, s := range h.Command {
			noNUL(r.at("exec").index("command", i), s)
		}
	}
	if h := p.GRPC; h != nil {
		handlers = append(handlers, "grpc")
		v.probePort(r.at("grpc").at("port"), IntOrString{Int: h.Port}, c)
	}
	switch {
	case len(handlers) == 0:
		r.neither("httpGet", "tcpSocket", "exec", "grpc")
	case len(handlers) > 1:
		r.both(handlers...)
	}
}

func control(c rune) bool { return c <= ' ' || c == 0x7f }

// probePort takes the container's port, by number or by name, or none: an instance has its own port on its machine, and
// nothing is known of a second one.
func (v validator) probePort(r report, port IntOrString, c *Container) {
	want, name := int32(DefaultPort), "http"
	if len(c.Ports) > 0 {
		if c.Ports[0].ContainerPort != 0 {
			want = c.Ports[0].ContainerPort
		}
		if c.Ports[0].Name != "" {
			name = c.Ports[0].Name
		}
	}
	switch {
	case port.IsZero(), port.String == "" && port.Int == want, port.String != "" && port.String == name:
	case port.String != "":
		r.invalidWhy(port.String, "Probe port must match container port")
	default:
		r.invalidWhy(port.Int, "Probe port must match container port")
	}
}

// readinessTimes: without a period the probe is repeated as fast as is sensible, and has neither time-out nor count.
func (v validator) readinessTimes(r report, p *Probe) {
	atLeast(r, "periodSeconds", p.PeriodSeconds, 0)
	atLeast(r, "initialDelaySeconds", p.InitialDelaySeconds, 0)
	atLeast(r, "successThreshold", p.SuccessThreshold, 1)
	if p.TerminationGracePeriodSeconds != nil {
		r.at("terminationGracePeriodSeconds").forbidden()
	}
	if p.PeriodSeconds != 0 {
		atLeast(r, "timeoutSeconds", p.TimeoutSeconds, 1)
		atLeast(r, "failureThreshold", p.FailureThreshold, 1)
		return
	}
	if p.FailureThreshold != 0 {
		r.at("failureThreshold").generic("failureThreshold is disallowed when periodSeconds is zero")
	}
	if p.TimeoutSeconds != 0 {
		r.at("timeoutSeconds").generic("timeoutSeconds is disallowed when periodSeconds is zero")
	}
}

// livenessTimes: zero means Kubernetes' default (period 10, time-out 1, failures 3), and one success is enough.
func (v validator) livenessTimes(r report, p *Probe) {
	atLeast(r, "periodSeconds", p.PeriodSeconds, 0)
	atLeast(r, "initialDelaySeconds", p.InitialDelaySeconds, 0)
	atLeast(r, "timeoutSeconds", p.TimeoutSeconds, 0)
	atLeast(r, "failureThreshold", p.FailureThreshold, 0)
	if p.SuccessThreshold != 0 && p.SuccessThreshold != 1 {
		r.at("successThreshold").invalidWhy(p.SuccessThreshold, "must be 1")
	}
	if t := p.TerminationGracePeriodSeconds; t != nil && *t < 1 {
		r.at("terminationGracePeriodSeconds").bounds(*t, 1, int64(math.MaxInt32))
	}
}

func atLeast(r report, field string, value, low int32) {
	if value < low {
		r.at(field).bounds(value, low, math.MaxInt32)
	}
}

// volumes checks the names, which is all that is used of volumes so far, and returns them.
func (v validator) volumes(r report, s *RevisionSpec) map[string]bool {
	mounted, names := map[string]bool{}, map[string]bool{}
	for i := range s.Containers {
		// What is wrong with the mounts is said where they are checked.
		mounts := validator{}.list(report{errs: new(Errors)}, s.Containers[i].VolumeMounts)
		for _, m := range mounts {
			mounted[text(m["name"])] = true
		}
	}
	for i, volume := range v.list(r, s.Volumes) {
		at := report{r.errs, fmt.Sprintf("%s[%d].name", r.path, i)}
		name := text(volume["name"])
		switch {
		case name == "":
			at.missing()
		case names[name]:
			at.add(FieldValueDuplicate, fmt.Sprintf("duplicate volume name %q", shorten(name)), "")
		case !mounted[name]:
			at.generic(fmt.Sprintf("volume with name %q not mounted", shorten(name)))
		default:
			at.wrongs(name, checkDNS1123(name))
		}
		names[name] = true
	}
	return names
}

func (v validator) mounts(r report, raw json.RawMessage, volumes map[string]bool) {
	seen := map[string]bool{}
	for i, m := range v.list(r, raw) {
		at := report{r.errs, fmt.Sprintf("%s[%d]", r.path, i)}
		if name := text(m["name"]); !volumes[name] {
			at.at("name").generic("volumeMount has no matching volume")
		}
		where := text(m["mountPath"])
		clean := path.Clean(where)
		switch {
		case where == "":
			at.at("mountPath").missing()
		case slices.Contains(reservedPaths, clean):
			at.at("mountPath").generic(fmt.Sprintf("mountPath %q is a reserved path", clean))
		case !path.IsAbs(where):
			at.at("mountPath").invalid(where)
		case seen[clean]:
			at.at("mountPath").invalid(fmt.Sprintf("%q must be unique", shorten(where)))
		}
		seen[clean] = true
	}
}

// text is a raw string; empty when it is anything else.
func text(raw json.RawMessage) string {
	var s string
	if json.Unmarshal(raw, &s) != nil {
		return ""
	}
	return s
}

func (v validator) securityContext(r report, raw json.RawMessage) {
	if !present(raw) {
		return
	}
	var fields map[string]json.RawMessage
	if json.Unmarshal(raw, &fields) != nil {
		r.invalidWhy(string(raw), "expected an object")
		return
	}
	for _, name := range forbiddenSecurity {
		if f := fields[name]; present(f) && string(f) != "false" {
			r.at(name).forbidden()
		}
	}
	for _, name := range []string{"runAsUser", "runAsGroup"} {
		if !present(fields[name]) {
			continue
		}
		var id int64
		if json.Unmarshal(fields[name], &id) != nil {
			r.at(name).invalidWhy(string(fields[name]), "expected an integer")
		} else if id < 0 || id > math.MaxInt32 {
			r.at(name).bounds(id, 0, math.MaxInt32)
		}
	}
}
