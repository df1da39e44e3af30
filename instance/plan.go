package instance

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/code"
	"github.com/thawrun/thaw/instance/process"
)

// defaultProgress is how long an instance may take to get ready when the revision does not say (Knative's default).
const defaultProgress = 600 * time.Second

// plan is all that can be worked out about starting instances of a revision before the first one is needed.
type plan struct {
	rev  *api.Revision
	code *code.Code
	err  error // why nothing can be started, with its reason; nil = plan is complete

	program string
	argv    []string
	dir     string
	path    string // PATH, for a container that sets none
	limits  process.Limits
	socket  bool // passes the listening socket as fd 3

	startup, readiness, liveness *api.Probe

	progress time.Duration // from exec to ready
	drain    time.Duration // longest that requests inside may take
	grace    time.Duration // from SIGTERM to SIGKILL
}

// locator finds code by image.
type locator interface {
	Locate(image string) (*code.Code, error)
}

// newPlan never fails: what is wrong with a revision is found out by whoever wants to start an instance of it, and shows up
// as the revision's failure.
func newPlan(rev *api.Revision, cfg Config, find locator) *plan {
	total, _, _ := rev.Timeouts()
	p := &plan{
		rev:      rev,
		socket:   rev.Annotations[api.AnnotationSocket] == "fd3",
		progress: defaultProgress,
		drain:    total,
		grace:    min(total, cfg.Grace),
	}
	if d, err := time.ParseDuration(rev.Annotations[api.AnnotationProgressDeadline]); err == nil && d > 0 {
		p.progress = d
	}
	c := rev.Serving()
	if c == nil {
		p.err = &failure{reason: reasonStartFailed, message: "the revision has no container that takes requests"}
		return p
	}
	p.startup, p.readiness, p.liveness = c.StartupProbe, c.ReadinessProbe, c.LivenessProbe
	p.limits = process.Limits{PIDs: cfg.MaxPIDs}
	if q, ok := c.Resources.Limits["memory"]; ok {
		n, err := parseBytes(string(q))
		if err != nil {
			p.err = &failure{reason: reasonStartFailed, message: "resources.limits.memory: " + err.Error()}
			return p
		}
		p.limits.MemoryBytes = n
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
	p.dir = p.code.Dir
	if c.WorkingDir != "" {
		p.dir = c.WorkingDir
		if !filepath.IsAbs(p.dir) {
			p.dir = filepath.Join(p.code.Dir, p.dir)
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
		if err != nil || !(f >= 0) || f*u.factor >= 1<<63 || strings.ContainsAny(number, "xXpP_iInN") {
			return 0, fmt.Errorf("%q is not a quantity of bytes", q)
		}
		return int64(f * u.factor), nil
	}
	return 0, fmt.Errorf("%q is not a quantity of bytes", q)
}
