package verbs

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/bundle"
	"github.com/thawrun/thaw/internal/client"
)

// annotationSource is put on the template by deploy --exec: the digest of the program and of the files among its arguments.
// A program that was built anew has the same path, so without it the server could not tell that there is something to deploy.
// The group is the one that kn puts its own notes under; the server does not look at it.
const annotationSource = "client.knative.dev/source"

type deployFlags struct {
	exec, dir, image string
	env, annotations []string
	port             string
	concurrency      int64
	minScale         int
	maxScale         int
	target           string
	wait             waitFlags
}

func deployCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	var d deployFlags
	cmd := &cobra.Command{
		Use:   "deploy NAME (--exec 'CMD ARG...' | --dir DIR | --image REF)",
		Short: "Deploy a program, a folder or an image as a service",
		Long: `Deploy makes a service, or gives an existing one a new revision. The flags say the whole template: what an earlier
deploy said and this one does not is gone. How the traffic is split stays as it is.

--exec   a command of this machine, for a server on this machine. The program is found through PATH, its working directory is
         the present one.
--dir    a folder with an executable file "run", or with function.py or function.js, to which a server is added, or a Go main
         package, which is built first. It is packed and uploaded.
--image  a reference that the server knows: exec:///PATH, pkg://sha256:DIGEST, or a name that it maps.

The program has to serve HTTP on the port in the environment variable PORT.`,
		Example: "  thaw deploy hello --dir examples/hello-go\n  thaw deploy api --exec 'python3 server.py' --concurrency 10 --max-scale 5\n  thaw deploy web --image dev.local/web --env MODE=prod",
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			svc, err := d.service(cmd, s.namespace, args[0])
			if err != nil {
				return err
			}
			if err := s.open(); err != nil {
				return err
			}
			if err := d.setCode(cmd.Context(), s, svc); err != nil {
				return err
			}
			return s.deploy(cmd.Context(), svc, d.wait)
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	s.outputFlag(cmd, false)
	d.wait.register(cmd)
	f := cmd.Flags()
	f.StringVar(&d.exec, "exec", "", "command of this machine, with arguments; quotes and backslashes work as in a shell")
	f.StringVar(&d.dir, "dir", "", "folder to pack and upload")
	f.StringVar(&d.image, "image", "", "image reference")
	f.StringArrayVarP(&d.env, "env", "e", nil, "environment variable NAME=VALUE; may be repeated")
	f.StringArrayVarP(&d.annotations, "annotation", "a", nil, "annotation KEY=VALUE of the template (serving.knative.dev/rollout-duration: of the service); may be repeated")
	f.StringVarP(&d.port, "port", "p", "", "port that PORT will say, with a protocol in front for HTTP/2: h2c:8080 (default 8080)")
	f.Int64Var(&d.concurrency, "concurrency", 0, "hard limit of requests inside one instance at once (0 = none)")
	f.IntVar(&d.minScale, "min-scale", 0, "never fewer instances than this")
	f.IntVar(&d.maxScale, "max-scale", 0, "never more instances than this (0 = no limit)")
	f.StringVar(&d.target, "target", "", "requests per instance that scaling aims at")
	return cmd
}

// service builds the object from the flags, all but the code.
func (d *deployFlags) service(cmd *cobra.Command, ns, name string) (*api.Service, error) {
	given := 0
	for _, v := range []string{d.exec, d.dir, d.image} {
		if v != "" {
			given++
		}
	}
	if given != 1 {
		return nil, usage("exactly one of --exec, --dir and --image must say what to deploy")
	}
	svc := &api.Service{ObjectMeta: api.ObjectMeta{Name: name, Namespace: ns}}
	c := api.Container{}
	for _, pair := range d.env {
		k, v, ok := strings.Cut(pair, "=")
		if !ok || k == "" {
			return nil, usage("--env %q is not of the form NAME=VALUE", pair)
		}
		c.Env = append(c.Env, api.EnvVar{Name: k, Value: v})
	}
	if d.port != "" {
		port, err := parsePort(d.port)
		if err != nil {
			return nil, err
		}
		c.Ports = []api.ContainerPort{port}
	}
	t := &svc.Spec.Template
	flags := cmd.Flags()
	if flags.Changed("concurrency") {
		t.Spec.ContainerConcurrency = &d.concurrency
	}
	ann := map[string]string{}
	if flags.Changed("min-scale") {
		ann[api.AutoscalingGroup+"/"+api.ScalingMin] = strconv.Itoa(d.minScale)
	}
	if flags.Changed("max-scale") {
		ann[api.AutoscalingGroup+"/"+api.ScalingMax] = strconv.Itoa(d.maxScale)
	}
	if d.target != "" {
		ann[api.AutoscalingGroup+"/"+api.ScalingTarget] = d.target
	}
	for _, pair := range d.annotations {
		k, v, ok := strings.Cut(pair, "=")
		if !ok || k == "" {
			return nil, usage("--annotation %q is not of the form KEY=VALUE", pair)
		}
		if k == api.AnnotationRolloutDuration { // read from the service, without effect in a template
			svc.Annotations = map[string]string{k: v}
			continue
		}
		ann[k] = v
	}
	if len(ann) > 0 {
		t.Annotations = ann
	}
	t.Spec.Containers = []api.Container{c}
	return svc, nil
}

func parsePort(text string) (api.ContainerPort, error) {
	name, number, ok := strings.Cut(text, ":")
	if !ok {
		name, number = "", text
	}
	n, err := strconv.ParseUint(number, 10, 16)
	if err != nil || n == 0 || (name != "" && name != "h2c" && name != "http1") {
		return api.ContainerPort{}, usage("--port %q is not of the form PORT, http1:PORT or h2c:PORT", text)
	}
	return api.ContainerPort{Name: name, ContainerPort: int32(n)}, nil
}

// setCode fills in the image, after looking for the program or packing and uploading the folder.
func (d *deployFlags) setCode(ctx context.Context, s *session, svc *api.Service) error {
	t := &svc.Spec.Template
	c := &t.Spec.Containers[0]
	switch {
	case d.image != "":
		c.Image = d.image
	case d.dir != "":
		image, err := s.upload(ctx, d.dir)
		if err != nil {
			return err
		}
		c.Image = image
	default:
		command, err := resolveCommand(ctx, d.exec)
		if err != nil {
			return err
		}
		c.Image, c.Args, c.WorkingDir = "exec://"+command.program, command.args, command.dir
		if t.Annotations == nil {
			t.Annotations = map[string]string{}
		}
		t.Annotations[annotationSource] = command.digest
	}
	return nil
}

// upload packs a folder into a temporary file and sends it.
func (s *session) upload(ctx context.Context, dir string) (string, error) {
	f, err := os.CreateTemp("", "thaw-package-*.tar.gz")
	if err != nil {
		return "", err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	s.say("  packing %s", dir)
	info, err := bundle.Create(ctx, dir, f, io.Discard)
	if err != nil {
		return "", err
	}
	if info.Built {
		s.say("  built it as a Go program")
	}
	s.say("  uploading %.1f MiB", float64(info.Size)/(1<<20))
	image, err := s.client.Upload(ctx, f)
	if err != nil {
		return "", fmt.Errorf("upload %s: %w", dir, err)
	}
	return image, nil
}

// command is what --exec says, made independent of the shell that it was typed in.
type command struct {
	program string // absolute
	args    []string
	dir     string // where it was typed, so that relative arguments mean the same
	digest  string // of the program and of the arguments that are files
}

func resolveCommand(ctx context.Context, line string) (command, error) {
	words, err := splitWords(line)
	if err != nil {
		return command{}, usage("--exec %q: %v", line, err)
	}
	if len(words) == 0 {
		return command{}, usage("--exec is empty")
	}
	path, err := exec.LookPath(words[0])
	if err != nil {
		return command{}, fmt.Errorf("--exec: %w", err)
	}
	if path, err = filepath.Abs(path); err != nil {
		return command{}, err
	}
	dir, err := os.Getwd()
	if err != nil {
		return command{}, err
	}
	c := command{program: realInterpreter(ctx, path), args: words[1:], dir: dir}
	sum := sha256.New()
	for _, p := range append([]string{c.program}, c.args...) {
		if st, err := os.Stat(p); err != nil || !st.Mode().IsRegular() {
			continue // an ordinary argument
		}
		f, err := os.Open(p)
		if err != nil {
			return command{}, fmt.Errorf("--exec: %w", err)
		}
		fmt.Fprintf(sum, "%s\n", p)
		_, err = io.Copy(sum, f)
		f.Close()
		if err != nil {
			return command{}, fmt.Errorf("--exec: read %s: %w", p, err)
		}
	}
	c.digest = "sha256:" + hex.EncodeToString(sum.Sum(nil))
	return c, nil
}

// interpreters tell their own path when asked so.
var interpreters = []struct {
	prefix string
	ask    []string
}{
	{"python", []string{"-c", "import sys; print(sys.executable)"}},
	{"node", []string{"-p", "process.execPath"}},
	{"ruby", []string{"-e", "puts RbConfig.ruby"}},
}

// realInterpreter looks behind the shims of version managers (pyenv, nodenv, asdf, …): shell scripts that look for the
// interpreter anew at each start, which takes longer than the start itself and depends on the folder. Other paths are left
// alone, links too: a Python of a virtual environment knows by its own path where its libraries are.
func realInterpreter(ctx context.Context, path string) string {
	if filepath.Base(filepath.Dir(path)) != "shims" {
		return path
	}
	for _, i := range interpreters {
		if !strings.HasPrefix(filepath.Base(path), i.prefix) {
			continue
		}
		out, err := exec.CommandContext(ctx, path, i.ask...).Output()
		real := string(bytes.TrimSpace(out))
		if st, serr := os.Stat(real); err == nil && serr == nil && filepath.IsAbs(real) && st.Mode().IsRegular() {
			return real
		}
	}
	return path
}

// splitWords takes a command line apart as a shell does, without expanding anything: blanks separate, single quotes keep
// everything, double quotes keep all but \" and \\, a backslash keeps the next character.
func splitWords(line string) ([]string, error) {
	var words []string
	var word strings.Builder
	inWord := false
	quote := rune(0)
	runes := []rune(line)
	for i := 0; i < len(runes); i++ {
		r := runes[i]
		switch {
		case r == '\\' && quote != '\'':
			if i+1 == len(runes) {
				return nil, errors.New("it ends in a backslash")
			}
			i++
			if quote == '"' && runes[i] != '"' && runes[i] != '\\' {
				word.WriteRune('\\')
			}
			word.WriteRune(runes[i])
			inWord = true
		case quote != 0:
			if r == quote {
				quote = 0
			} else {
				word.WriteRune(r)
			}
		case r == '\'' || r == '"':
			quote, inWord = r, true
		case r == ' ' || r == '\t' || r == '\n':
			if inWord {
				words = append(words, word.String())
				word.Reset()
				inWord = false
			}
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	if quote != 0 {
		return nil, fmt.Errorf("the quote %c is not closed", quote)
	}
	if inWord {
		words = append(words, word.String())
	}
	return words, nil
}

// deploy creates the service or replaces the template of the one that is there, and waits.
func (s *session) deploy(ctx context.Context, want *api.Service, wait waitFlags) error {
	o, outcome, err := s.createOrReplace(ctx, want)
	if err != nil {
		return err
	}
	svc := o.(*api.Service)
	if !s.structured() {
		fmt.Fprintf(s.Stdout, "service/%s %s\n", svc.Name, outcome)
	}
	if !wait.no {
		if o, err = s.waitReady(ctx, api.Services, svc.Namespace, svc.Name, wait); err != nil {
			return err
		}
		svc = o.(*api.Service)
	}
	if s.structured() {
		return s.print(svc)
	}
	if !wait.no {
		fmt.Fprintf(s.Stdout, "revision %s ready at %s\n", svc.Status.LatestReadyRevisionName, svc.Status.URL)
	}
	if pinned(svc.Spec.Traffic) {
		fmt.Fprintf(s.Stderr, "note: the traffic is pinned to revisions, so the new one gets none\nnext: thaw traffic %s --to @latest=100%s\n", svc.Name, s.nsFlag())
	}
	return nil
}

// pinned says whether no share of the traffic follows the latest revision.
func pinned(targets []api.TrafficTarget) bool {
	for _, t := range targets {
		if t.RevisionName == "" && (t.Percent == nil || *t.Percent > 0) {
			return false
		}
	}
	return len(targets) > 0
}

// nsFlag is what has to be added to a suggested command.
func (s *session) nsFlag() string {
	if s.namespace == "default" {
		return ""
	}
	return " -n " + s.namespace
}

// createOrReplace writes a service so that its template is the wanted one. Somebody else may write at the same time, the
// reconcilers do; a few conflicts are overcome.
func (s *session) createOrReplace(ctx context.Context, want *api.Service) (api.Object, client.Outcome, error) {
	for try := 0; ; try++ {
		o, outcome, err := s.createOrReplaceOnce(ctx, want)
		if try < 5 && (errors.Is(err, client.ErrConflict) || errors.Is(err, client.ErrAlreadyExists)) {
			continue
		}
		return o, outcome, err
	}
}

func (s *session) createOrReplaceOnce(ctx context.Context, want *api.Service) (api.Object, client.Outcome, error) {
	before, err := s.client.Get(ctx, api.Services, want.Namespace, want.Name)
	if errors.Is(err, client.ErrNotFound) {
		o, err := s.client.Create(ctx, api.Services, want)
		return o, client.Created, err
	}
	if err != nil {
		return nil, "", err
	}
	next := api.DeepCopy(before.(*api.Service))
	next.Spec.Template = want.Spec.Template
	for k, v := range want.Annotations {
		if next.Annotations == nil {
			next.Annotations = map[string]string{}
		}
		next.Annotations[k] = v
	}
	after, err := s.client.Replace(ctx, api.Services, next)
	if err != nil {
		return nil, "", err
	}
	return after, client.Compare(before, after), nil
}
