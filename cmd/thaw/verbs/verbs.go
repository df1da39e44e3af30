// Package verbs has the commands that people use against a running Thaw: apply, deploy, list, describe, delete, logs,
// invoke, traffic, rollback, vpc, subnet, gateway, eip, node, kubeconfig and version. They speak to the API through internal/client and to functions
// through the ingress, and share nothing with the server's code but the vocabulary.
//
// What is asked for goes to standard output; progress, warnings and errors go to standard error. An error says what failed,
// why, and where there is one, the next command.
package verbs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
)

// Env is what verbs take from the process they run in.
type Env struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	Progress       bool // say on Stderr what is being waited for; on when that is a terminal
	Version        string
	Now            func() time.Time

	started bool // a command has begun to run: what goes wrong now is not a matter of usage
}

// System is the Env of a real process.
func System(version string) *Env {
	return &Env{
		Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv,
		Progress: isTerminal(os.Stderr), Version: version, Now: time.Now,
	}
}

// isTerminal is good enough to decide about progress lines: a character device that is not the null device.
func isTerminal(f *os.File) bool {
	st, err := f.Stat()
	if err != nil || st.Mode()&os.ModeCharDevice == 0 {
		return false
	}
	null, err := os.Stat(os.DevNull)
	return err != nil || !os.SameFile(st, null)
}

// Exit codes of all commands; docs/cli.md lists them for scripts.
const (
	ExitOK          = 0
	ExitFailed      = 1 // anything that has no code of its own
	ExitUsage       = 2 // unknown command or flag, missing or wrong argument
	ExitUnreachable = 3 // no server, or it does not accept the token
	ExitNotFound    = 4 // the named object does not exist
	ExitRefused     = 5 // the server refused the request: invalid, already there, changed meanwhile
	ExitNotReady    = 6 // done, but the object failed or did not get ready in time
	ExitAnswer      = 7 // invoke: the answer's status was 400 or above
)

// Failure is an error with what a person can do next and an exit code.
type Failure struct {
	Err  error
	Next string // a command or a short sentence; "" = nothing to suggest
	Code int    // 0 = by the kind of Err
}

func (f *Failure) Error() string { return f.Err.Error() }

func (f *Failure) Unwrap() error { return f.Err }

// fail attaches the next command to an error; nil stays nil.
func fail(err error, next string, args ...any) error {
	if err == nil {
		return nil
	}
	return &Failure{Err: err, Next: fmt.Sprintf(next, args...)}
}

// usage is an error about the command line that only the command itself could find.
func usage(format string, args ...any) error {
	return &Failure{Err: fmt.Errorf(format, args...), Code: ExitUsage}
}

// ExitCode is the exit code for what a command returned.
func ExitCode(err error) int {
	var (
		f *Failure
		u *client.UnreachableError
		n *client.NotReadyError
		s *client.StatusError
	)
	switch {
	case err == nil:
		return ExitOK
	case errors.As(err, &f) && f.Code != 0:
		return f.Code
	case errors.As(err, &u), errors.Is(err, client.ErrUnauthorized):
		return ExitUnreachable
	case errors.As(err, &n):
		return ExitNotReady
	case errors.Is(err, client.ErrNotFound):
		return ExitNotFound
	case errors.As(err, &s):
		return ExitRefused
	}
	return ExitFailed
}

// next is the suggestion that goes with an error when the command had none.
func next(err error) string {
	var (
		f *Failure
		u *client.UnreachableError
		n *client.NotReadyError
	)
	switch {
	case errors.As(err, &f) && f.Next != "":
		return f.Next
	case errors.As(err, &u):
		return "start a server here with: thaw dev; or name one with --api or THAW_API"
	case errors.Is(err, client.ErrUnauthorized):
		return "set THAW_TOKEN, or name the server's data directory, which has the token, with --data or THAW_DATA"
	case errors.As(err, &n):
		return "thaw describe " + n.Name
	case errors.Is(err, client.ErrConflict):
		return "somebody else changed it at the same time; run the command again"
	}
	return ""
}

// Main runs a command line and returns the exit code. Errors are printed here and nowhere else.
func Main(ctx context.Context, root *cobra.Command, env *Env) int {
	root.SilenceErrors, root.SilenceUsage = true, true
	root.CompletionOptions.HiddenDefaultCmd = true
	root.SetIn(env.Stdin)
	root.SetOut(env.Stdout)
	root.SetErr(env.Stderr)
	env.started = false
	root.PersistentPreRun = func(*cobra.Command, []string) { env.started = true }
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return ExitOK
	}
	code := ExitCode(err)
	if !env.started && code == ExitFailed {
		code = ExitUsage
	}
	if errors.Is(err, context.Canceled) && ctx.Err() != nil {
		fmt.Fprintln(env.Stderr, "thaw: interrupted")
		return code
	}
	fmt.Fprintf(env.Stderr, "thaw: %s\n", err)
	hint := next(err)
	if code == ExitUsage && hint == "" {
		hint = cmd.CommandPath() + " --help"
	}
	if hint != "" {
		fmt.Fprintf(env.Stderr, "next: %s\n", hint)
	}
	return code
}

// Commands are all verbs.
func Commands(env *Env) []*cobra.Command {
	return append(netCommands(env),
		applyCommand(env), deployCommand(env), listCommand(env), describeCommand(env), explainScaleCommand(env), deleteCommand(env), logsCommand(env),
		invokeCommand(env), trafficCommand(env), rollbackCommand(env), kubeconfigCommand(env), versionCommand(env),
		nodeCommand(env),
	)
}

// session is what nearly every verb has: a server, a namespace and a way to print.
type session struct {
	*Env
	api, data, ca string
	namespace     string
	output        string
	client        *client.Client
}

// serverFlags are the flags that find the server.
func (s *session) serverFlags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&s.api, "api", "", "address of the API (THAW_API; default "+client.DefaultServer+")")
	f.StringVar(&s.data, "data", "", "data directory whose file \"token\" is used (THAW_DATA; default ~/.thaw); THAW_TOKEN goes before it")
	f.StringVar(&s.ca, "ca", "", "file with the certificate authority of an https API (THAW_CA)")
}

func (s *session) namespaceFlag(cmd *cobra.Command) {
	cmd.Flags().StringVarP(&s.namespace, "namespace", "n", "default", "namespace")
}

func (s *session) outputFlag(cmd *cobra.Command, wide bool) {
	formats := "json or yaml"
	if wide {
		formats = "json, yaml or wide"
	}
	cmd.Flags().StringVarP(&s.output, "output", "o", "", "print as "+formats)
}

func (s *session) checkOutput() error {
	switch s.output {
	case "", "json", "yaml", "wide":
		return nil
	}
	return usage("unknown output format %q; known are json, yaml and wide", s.output)
}

// open makes the client. Verbs call it first, after the checks that need no server.
func (s *session) open() error {
	if err := s.checkOutput(); err != nil {
		return err
	}
	c, err := client.Discover(s.api, s.data, s.Getenv)
	if err != nil {
		return err
	}
	c.CAFile = s.ca
	if c.CAFile == "" {
		c.CAFile = s.Getenv("THAW_CA")
	}
	c.Agent = "thaw"
	seen := map[string]bool{}
	c.Warn = func(text string) {
		if !seen[text] {
			seen[text] = true
			fmt.Fprintf(s.Stderr, "warning: %s\n", text)
		}
	}
	s.client, err = client.New(c)
	return err
}

// say prints a line about what is going on, for people who watch.
func (s *session) say(format string, args ...any) {
	if s.Progress {
		fmt.Fprintf(s.Stderr, format+"\n", args...)
	}
}

// waitFlags are shared by the verbs that wait.
type waitFlags struct {
	no      bool
	timeout time.Duration
}

func (w *waitFlags) register(cmd *cobra.Command) {
	cmd.Flags().BoolVar(&w.no, "no-wait", false, "return as soon as the server has accepted it")
	cmd.Flags().DurationVar(&w.timeout, "wait-timeout", 2*time.Minute, "how long to wait until it is ready")
}

// waitReady waits for an object with progress, and turns a failure into advice.
func (s *session) waitReady(ctx context.Context, k *api.Kind, ns, name string, w waitFlags) (api.Object, error) {
	start := s.Now()
	o, err := s.client.WaitReady(ctx, k, ns, name, client.WaitOptions{
		Timeout: w.timeout,
		Progress: func(c api.Condition) {
			text := c.Message
			if c.Reason != "" {
				text = strings.TrimSuffix(c.Reason+": "+text, ": ")
			}
			if c.Status == api.True {
				text = "ready"
			}
			if text == "" {
				text = "waiting"
			}
			s.say("  %5.1fs %s %s: %s", s.Now().Sub(start).Seconds(), k.Singular, name, firstLine(text))
		},
	})
	if n := (*client.NotReadyError)(nil); errors.As(err, &n) {
		suffix := ""
		if ns != "default" {
			suffix = " -n " + ns
		}
		switch {
		case slices.Contains([]*api.Kind{api.VPCs, api.Subnets, api.Gateways}, k):
			return o, fail(err, "thaw %s describe %s%s", k.Singular, name, suffix)
		case k != api.Services:
			return o, fail(err, "thaw list %s -o yaml%s", k.Plural, suffix)
		case n.Failed: // its output often says why, the conditions always do
			return o, fail(err, "thaw logs %s%s; thaw describe %s%s", name, suffix, name, suffix)
		}
		return o, fail(err, "thaw describe %s%s", name, suffix)
	}
	return o, err
}

func firstLine(s string) string {
	line, _, _ := strings.Cut(s, "\n")
	return line
}

// exactArgs is cobra.ExactArgs with a sentence that names what is missing.
func exactArgs(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if len(args) < len(names) {
			return usage("missing argument: %s", names[len(args)])
		}
		if len(args) > len(names) {
			return usage("unexpected argument: %q", args[len(names)])
		}
		return nil
	}
}

// service reads one service; the error for one that is not there names the command that shows what is.
func (s *session) service(ctx context.Context, name string) (*api.Service, error) {
	o, err := s.client.Get(ctx, api.Services, s.namespace, name)
	if errors.Is(err, client.ErrNotFound) {
		return nil, fail(fmt.Errorf("no service %q in namespace %q: %w", name, s.namespace, client.ErrNotFound), "thaw list -n %s", s.namespace)
	}
	if err != nil {
		return nil, err
	}
	return o.(*api.Service), nil
}
