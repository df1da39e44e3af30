package instance

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/code"
	"github.com/thawrun/thaw/instance/provider"
	"github.com/thawrun/thaw/internal/placement"
)

// defaultProgress is how long an instance may take to get ready when the revision does not say (Knative's default).
const defaultProgress = 600 * time.Second

// plan is all that can be worked out about starting instances of a revision before the first one is needed.
type plan struct {
	rev   *api.Revision
	class placement.Class
	code  *code.Code
	err   error // why nothing can be started, with its reason; nil = plan is complete

	program string
	argv    []string
	dir     string
	path    string // PATH, for a container that sets none
	limits  provider.Limits
	shown   []string // files and folders of the machine that the instance has to see
	socket  bool     // passes the listening socket as fd 3
	says    bool     // writes a byte to fd 4 when it is ready
	host    bool     // shares the machine's network
	subnet  string   // VPC/SUBNET that it is attached to; "" = none
	port    int      // to listen on in a network of its own; 0 = any free one of the machine
	home    string   // HOME and TMPDIR; "" = the instance's folder
	uid     int      // in a sandbox

	startup, readiness, liveness *api.Probe

	language string // of blanks that can become an instance of this; "" = none

	frozenFor time.Duration // how long an idle instance is kept frozen; 0 = it is not
	frozenMax int           // and how many of the revision

	progress time.Duration // from exec to ready
	drain    time.Duration // longest that requests inside may take
	grace    time.Duration // from SIGTERM to SIGKILL
}

// spec is what all instances of the revision are started with.
func (p *plan) spec() *provider.Spec {
	return &provider.Spec{
		Path: p.program, Argv: p.argv, Dir: p.dir, Code: p.shown, Limits: p.limits, UID: p.uid, HostNetwork: p.host,
	}
}

// locator finds code by image.
type locator interface {
	Locate(image string) (*code.Code, error)
}

// newPlan makes the plan of a revision with what the provider has to say about it.
func (a *Agent) newPlan(rev *api.Revision) *plan {
	p := newPlan(rev, a.cfg, a.code)
	if a.caps.OwnNetwork && !p.host {
		p.port = defaultPort
		if c := rev.Serving(); c != nil && len(c.Ports) > 0 && c.Ports[0].ContainerPort != 0 {
			p.port = int(c.Ports[0].ContainerPort)
		}
	}
	if a.caps.OwnFiles {
		p.home = "/tmp"
	}
	if p.err == nil && p.subnet != "" {
		p.err = a.mayAttach(p)
	}
	if p.err != nil {
		return p
	}
	ctx, cancel := context.WithTimeout(context.Background(), providerPatience)
	defer cancel()
	if err := a.provider.Prepare(ctx, p.spec()); err != nil {
		p.err = &failure{reason: reasonStartFailed, message: err.Error()}
		return p
	}
	p.language = p.blankLanguage(a.caps.LateLimits)
	return p
}

// mayAttach says why no instance of the plan can be attached to its subnet on this node.
func (a *Agent) mayAttach(p *plan) error {
	why := ""
	switch {
	case p.host:
		why = fmt.Sprintf("the annotations %s and %s exclude each other", api.AnnotationNetwork, api.AnnotationSubnet)
	case !a.caps.OwnNetwork:
		why = fmt.Sprintf("the annotation %s needs instances with a network of their own, which the provider %s does not make (sandboxes do, on Linux as root)", api.AnnotationSubnet, a.caps.Name)
	case a.cfg.Networks == nil:
		why = fmt.Sprintf("the annotation %s: this node is not connected to networks of tenants", api.AnnotationSubnet)
	default:
		return nil
	}
	return &failure{reason: reasonStartFailed, message: why}
}

// defaultPort is what a function that names no containerPort listens on, if it has all ports to itself.
const defaultPort = 8080

// newPlan never fails: what is wrong with a revision is found out by whoever wants to start an instance of it, and shows up
// as the revision's failure.
func newPlan(rev *api.Revision, cfg Config, find locator) *plan {
	total, _, _ := rev.Timeouts()
	p := &plan{
		rev:      rev,
		class:    placement.ClassOf(rev),
		socket:   rev.Annotations[api.AnnotationSocket] == api.SocketFD3,
		says:     rev.Annotations[api.AnnotationReady] == api.ReadyFD4,
		host:     rev.Annotations[api.AnnotationNetwork] == api.NetworkHost,
		subnet:   rev.Annotations[api.AnnotationSubnet],
		progress: defaultProgress,
		drain:    total,
		grace:    min(total, cfg.Grace),
	}
	p.frozenFor, p.frozenMax = rev.Frozen(cfg.FrozenFor, cfg.FrozenMax)
	if d, err := time.ParseDuration(rev.Annotations[api.AnnotationProgressDeadline]); err == nil && d > 0 {
		p.progress = d
	}
	c := rev.Serving()
	if c == nil {
		p.err = &failure{reason: reasonStartFailed, message: "the revision has no container that takes requests"}
		return p
	}
	p.uid = runAsUser(c)
	p.startup, p.readiness, p.liveness = c.StartupProbe, c.ReadinessProbe, c.LivenessProbe
	p.limits = provider.Limits{PIDs: cfg.MaxPIDs, MemoryBytes: p.class.MemoryLimit(), Precaution: true}
	if q, ok := c.Resources.Limits["memory"]; ok {
		n, err := parseBytes(string(q))
		if err != nil {
			p.err = &failure{reason: reasonStartFailed, message: "resources.limits.memory: " + err.Error()}
			return p
		}
		p.limits.MemoryBytes, p.limits.Precaution = n, false
	}
	if q, ok := c.Resources.Limits["cpu"]; ok {
		n, err := parseNumber(string(q))
		if err != nil {
			p.err = &failure{reason: reasonStartFailed, message: "resources.limits.cpu: " + err.Error()}
			return p
		}
		p.limits.CPUMillis = int64(max(1, min(n, 1e6)*1000))
	}
	if q, ok := c.Resources.Requests["cpu"]; ok {
		n, err := parseNumber(string(q))
		if err != nil {
			p.err = &failure{reason: reasonStartFailed, message: "resources.requests.cpu: " + err.Error()}
			return p
		}
		p.limits.CPURequest = int64(min(n, 1e6) * 1000)
	}
	if err := p.locate(c, cfg, find); err != nil {
		p.err = &failure{reason: reasonOf(err), message: err.Error()}
		return p
	}
	p.path = cfg.Path
	return p
}

// locate finds the code and the program. The digest in the status, when there is one, counts more than the image in the spec:
// a tag or a file may mean something else by now.
func (p *plan) locate(c *api.Container, cfg Config, find locator) error {
	image := c.Image
	for _, st := range p.rev.Status.ContainerStatuses {
		if st.ImageDigest != "" && (st.Name == c.Name || len(p.rev.Status.ContainerStatuses) == 1) {
			image = st.ImageDigest
		}
	}
	var err error
	if p.code, err = find.Locate(image); err != nil {
		return err
	}
	if len(c.Command) == 0 {
		p.socket, p.says = p.socket || p.code.Socket, p.says || p.code.Says
	}
	p.dir, p.shown = p.code.Dir, p.code.Shown()
	if c.WorkingDir != "" {
		p.dir = c.WorkingDir
		if !filepath.IsAbs(p.dir) {
			p.dir = filepath.Join(p.code.Dir, p.dir)
		} else if _, err := os.Stat(p.dir); err == nil && p.code.Program != "" && strings.HasPrefix(image, "exec://") {
			p.shown = append(p.shown, filepath.Clean(p.dir)) // a folder of this machine, as the program is
		}
	}
	if len(c.Command) == 0 {
		if err := p.code.CheckProgram(); err != nil {
			return err
		}
		p.program = p.code.Program
		p.argv = append([]string{p.program}, c.Args...)
		return nil
	}
	if p.program, err = lookProgram(c.Command[0], p.code.Dir, cfg.Path); err != nil {
		return err
	}
	p.argv = slices.Concat(c.Command, c.Args)
	return nil
}

// runAsUser is the user that a container asks for; what it may be was checked when the object was made.
func runAsUser(c *api.Container) int {
	var sc struct{ RunAsUser int }
	_ = json.Unmarshal(c.SecurityContext, &sc)
	return sc.RunAsUser
}

// lookProgram finds the program of a container's command: an absolute path, a path relative to the code, or a name on PATH.
func lookProgram(name, dir, path string) (string, error) {
	if filepath.IsAbs(name) {
		return name, nil
	}
	if strings.Contains(name, "/") {
		return filepath.Join(dir, name), nil
	}
	for _, d := range filepath.SplitList(path) {
		file := filepath.Join(d, name)
		if fi, err := os.Stat(file); filepath.IsAbs(file) && err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("%w: command %q is not on PATH (%s)", code.ErrNotFound, name, path)
}

// homeOr returns where an instance may write.
func (p *plan) homeOr(folder string) string {
	if p.home != "" {
		return p.home
	}
	return folder
}

// environ completes argv and makes the environment of one instance. That is done at each start: it takes a few microseconds, and most
// revisions of an installation are idle. A container's own HOME or TMPDIR wins over ours; PORT and K_* cannot be set by
// containers.
func (p *plan) environ(port int, home string) (argv, env []string) {
	c := p.rev.Serving()
	if c == nil {
		c = new(api.Container) // nothing of it will be started
	}
	has := func(name string) bool {
		return slices.ContainsFunc(c.Env, func(v api.EnvVar) bool { return v.Name == name })
	}
	env = make([]string, 0, len(c.Env)+7)
	env = append(env, "PORT="+strconv.Itoa(port))
	for _, name := range []string{"HOME", "TMPDIR"} {
		if !has(name) {
			env = append(env, name+"="+home)
		}
	}
	if !has("PATH") {
		env = append(env, "PATH="+p.path)
	}
	env = append(env,
		"K_SERVICE="+p.rev.ServiceName(), "K_CONFIGURATION="+p.rev.ConfigurationName(), "K_REVISION="+p.rev.Name)
	for _, v := range c.Env {
		env = append(env, v.Name+"="+v.Value)
	}
	refers := func(s string) bool { return strings.Contains(s, "$(") }
	if !slices.ContainsFunc(p.argv, refers) && !slices.ContainsFunc(env, refers) {
		return p.argv, env
	}
	known := make(map[string]string, len(env))
	for i, v := range env {
		name, value, _ := strings.Cut(v, "=")
		value = expand(value, known)
		known[name], env[i] = value, name+"="+value
	}
	argv = make([]string, len(p.argv))
	for i, a := range p.argv {
		argv[i] = expand(a, known)
	}
	return argv, env
}

// expand replaces $(NAME) by its value as Kubernetes does: what is not known stays as it is, and $$ stands for one $.
func expand(s string, known map[string]string) string {
	var b strings.Builder
	for {
		i := strings.IndexByte(s, '$')
		if i < 0 || i == len(s)-1 {
			b.WriteString(s)
			return b.String()
		}
		b.WriteString(s[:i])
		s = s[i:]
		switch s[1] {
		case '$':
			b.WriteByte('$')
			s = s[2:]
			continue
		case '(':
			if end := strings.IndexByte(s, ')'); end > 0 {
				if v, ok := known[s[2:end]]; ok {
					b.WriteString(v)
				} else {
					b.WriteString(s[:end+1])
				}
				s = s[end+1:]
				continue
			}
		}
		b.WriteByte('$')
		s = s[1:]
	}
}

// parseBytes reads a Kubernetes quantity as a number of bytes.
func parseBytes(q string) (int64, error) {
	f, err := parseNumber(q)
	if err != nil || f >= 1<<63 {
		return 0, fmt.Errorf("%q is not a quantity of bytes", q)
	}
	return int64(f), nil
}

// parseNumber reads a Kubernetes quantity.
func parseNumber(q string) (float64, error) {
	units := []struct {
		suffix string
		factor float64
	}{
		{"Ki", 1 << 10}, {"Mi", 1 << 20}, {"Gi", 1 << 30}, {"Ti", 1 << 40}, {"Pi", 1 << 50}, {"Ei", 1 << 60},
		{"k", 1e3}, {"M", 1e6}, {"G", 1e9}, {"T", 1e12}, {"P", 1e15}, {"E", 1e18}, {"m", 1e-3}, {"", 1},
	}
	for _, u := range units {
		number, ok := strings.CutSuffix(q, u.suffix)
		if !ok {
			continue
		}
		f, err := strconv.ParseFloat(number, 64)
		if err != nil || !(f >= 0) || math.IsInf(f, 0) || strings.ContainsAny(number, "xXpP_iInN") {
			return 0, fmt.Errorf("%q is not a quantity", q)
		}
		return f * u.factor, nil
	}
	return 0, fmt.Errorf("%q is not a quantity", q)
}
