package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/observe"
	"github.com/thawrun/thaw/queueproxy"
)

// config is all that can be set. An empty address is not opened.
type config struct {
	listen, admin, stats, metrics string
	upstream                      string
	protocol                      string // that the function speaks, as forward.Config.Protocol

	concurrency int
	queue       int           // as queueproxy.Config.Queue
	maxWait     time.Duration // as queueproxy.Config.MaxWait

	total, responseStart, idle time.Duration // of the function's answer; 0 = no limit

	probe *api.Probe // nil = probes are not answered

	namespace, revision, instance string

	drainQuiet   time.Duration // a drain begins to refuse after so long without a request
	drainCancel  time.Duration // a drain by hook is taken back without SIGTERM within this; 0 = never
	drainTimeout time.Duration // 0 = a drain ends with the last request, whenever that is

	observe  observe.Config // access log and traces
	logLevel slog.Level
	version  bool
	notes    []string // what was given and has no effect
}

// Knative's ports.
const (
	portHTTP    = "8012"
	portHTTP2   = "8013"
	portAdmin   = "8022"
	portStats   = "9090"
	portMetrics = "9091"
)

// ignored are variables of Knative's queue-proxy that say something we do not do yet: what each asks for, and its values that ask for nothing.
var ignored = []struct {
	name, what string
	nothing    []string
}{
	{"QUEUE_SERVING_TLS_PORT", "TLS between the hops is not served", []string{"", "8112"}}, // always given; without certificates it is not served there either
	{"SERVING_REQUEST_LOG_TEMPLATE", "Go templates are not understood; say --access-log and --access-log-format", []string{""}},
	{"SERVING_ENABLE_REQUEST_LOG", "say --access-log", []string{"", "false"}},
	{"ENABLE_PROFILING", "there is no profiling port", []string{"", "false"}},
	{"ENABLE_MULTI_CONTAINER_PROBES", "only the container with the port is probed", []string{"", "false"}},
}

// configure reads the flags and, unless --listen makes the process stand alone, Knative's environment. All that is wrong is
// reported at once.
func configure(args []string, env func(string) (string, bool), out io.Writer) (*config, error) {
	c := &config{}
	var (
		queue, concurrency           int
		protocol, probe, level       string
		timeout, start, idle, wait   time.Duration
		listen, upstream, admin      string
		stats, metrics               string
		namespace, revision, insName string
	)
	fs := flag.NewFlagSet("queueproxy", flag.ContinueOnError)
	fs.SetOutput(out)
	fs.Usage = func() {
		fmt.Fprint(out, `queueproxy stands in front of one HTTP server and lets only so many requests inside at once.

  queueproxy --listen ADDR --upstream ADDR --concurrency N [--queue M]   stands alone
  queueproxy                                                             is a sidecar with Knative's environment and ports

`)
		fs.PrintDefaults()
	}
	fs.StringVar(&listen, "listen", "", "serve requests on this `address` and read no environment; nothing else is opened unless a flag says so")
	fs.StringVar(&upstream, "upstream", "", "`address` of the function (default 127.0.0.1:USER_PORT)")
	fs.IntVar(&concurrency, "concurrency", 0, "requests inside the function at once; 0 = no limit")
	fs.IntVar(&queue, "queue", -1, "requests that may wait; -1 = 10 x concurrency")
	fs.DurationVar(&wait, "max-wait", 0, "longest wait for a slot; 0 = the total time-out, or 5m without one")
	fs.DurationVar(&timeout, "timeout", 0, "total time of an answer, from the moment the function gets the request; 0 = no limit")
	fs.DurationVar(&start, "response-start-timeout", 0, "time to the head of the answer; 0 = no limit")
	fs.DurationVar(&idle, "idle-timeout", 0, "time between two bytes of the answer; 0 = no limit")
	fs.StringVar(&protocol, "upstream-protocol", "auto", "what the upstream speaks: h1, h2c (HTTP/2 without TLS), or auto: h2c if QUEUE_SERVING_PORT is 8013, else what each request came by, if the upstream takes h2c")
	fs.StringVar(&probe, "readiness-probe", "", "Kubernetes probe as `JSON`; answers probes with K-Network-Probe: queue")
	fs.StringVar(&admin, "admin", "", "`address` for /wait-for-drain, /healthz")
	fs.StringVar(&stats, "stats", "", "`address` for the autoscaler's statistics: /metrics, /stats")
	fs.StringVar(&metrics, "metrics", "", "`address` for /metrics")
	fs.StringVar(&namespace, "namespace", "", "label of the metrics")
	fs.StringVar(&revision, "revision", "", "label of the metrics")
	fs.StringVar(&insName, "instance", "", "label of the metrics, source of the statistics")
	fs.DurationVar(&c.drainQuiet, "drain-quiet", 0, "after SIGTERM, go on serving until so long has passed without a request")
	fs.DurationVar(&c.drainCancel, "drain-cancel", time.Second, "take a drain by /wait-for-drain back when no SIGTERM comes within this; 0 = never")
	fs.DurationVar(&c.drainTimeout, "drain-timeout", 0, "cut what is left after this; 0 = wait for the last request")
	c.observe.Flags(fs)
	fs.StringVar(&level, "log-level", "info", "debug, info, warn or error")
	fs.BoolVar(&c.version, "version", false, "print the version and end")
	if err := fs.Parse(args); err != nil {
		return nil, err
	}
	if fs.NArg() > 0 {
		return nil, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	given := map[string]bool{}
	fs.Visit(func(f *flag.Flag) { given[f.Name] = true })

	var errs []error
	if given["listen"] {
		if upstream == "" {
			errs = append(errs, errors.New("--upstream is missing: the address of the server to stand in front of"))
		}
		c.listen = listen
	} else {
		errs = append(errs, c.fromEnvironment(env)...)
	}

	// Flags win.
	set := func(name string, f func()) {
		if given[name] {
			f()
		}
	}
	set("upstream", func() { c.upstream = upstream })
	set("admin", func() { c.admin = admin })
	set("stats", func() { c.stats = stats })
	set("metrics", func() { c.metrics = metrics })
	set("concurrency", func() { c.concurrency = concurrency })
	set("timeout", func() { c.total = timeout })
	set("response-start-timeout", func() { c.responseStart = start })
	set("idle-timeout", func() { c.idle = idle })
	set("namespace", func() { c.namespace = namespace })
	set("revision", func() { c.revision = revision })
	set("instance", func() { c.instance = insName })
	set("readiness-probe", func() {
		var err error
		if c.probe, err = readProbe(probe); err != nil {
			errs = append(errs, fmt.Errorf("--readiness-probe: %w", err))
		}
	})
	switch {
	case queue > 0:
		c.queue = queue
	case queue == 0:
		c.queue = -1 // none
	case queue < -1:
		errs = append(errs, fmt.Errorf("--queue %d: expected a number of requests, or -1", queue))
	}
	if c.maxWait = wait; wait == 0 {
		c.maxWait = c.total // 0 stays the default
	}
	if c.concurrency < 0 {
		errs = append(errs, fmt.Errorf("--concurrency %d: expected 0 or more", c.concurrency))
	}
	for _, d := range []struct {
		name string
		d    time.Duration
	}{{"max-wait", wait}, {"timeout", c.total}, {"response-start-timeout", c.responseStart}, {"idle-timeout", c.idle},
		{"drain-quiet", c.drainQuiet}, {"drain-cancel", c.drainCancel}, {"drain-timeout", c.drainTimeout}} {
		if d.d < 0 {
			errs = append(errs, fmt.Errorf("--%s %v: expected 0 or more", d.name, d.d))
		}
	}
	switch protocol {
	case "auto":
		if c.protocol == "" { // the environment does not say
			c.protocol = "auto"
		}
	case "h1":
		c.protocol = ""
	case "h2c":
		c.protocol = "h2c"
	default:
		errs = append(errs, fmt.Errorf("--upstream-protocol %q: expected auto, h1 or h2c", protocol))
	}
	if err := c.logLevel.UnmarshalText([]byte(level)); err != nil {
		errs = append(errs, fmt.Errorf("--log-level %q: expected debug, info, warn or error", level))
	}
	for _, a := range []struct{ name, addr string }{{"listen", c.listen}, {"upstream", c.upstream}, {"admin", c.admin}, {"stats", c.stats}, {"metrics", c.metrics}} {
		if a.addr == "" {
			continue
		}
		if _, _, err := net.SplitHostPort(a.addr); err != nil {
			errs = append(errs, fmt.Errorf("--%s %q: expected HOST:PORT", a.name, a.addr))
		}
	}
	if c.instance == "" {
		c.instance = c.listen
	}
	return c, errors.Join(errs...)
}

// fromEnvironment reads what Knative's controller gives to its queue-proxy.
func (c *config) fromEnvironment(env func(string) (string, bool)) (errs []error) {
	number := func(name, def string, low, high int) int {
		v, ok := env(name)
		if !ok || v == "" {
			v = def
		}
		n, err := strconv.Atoi(v)
		if err != nil || n < low || n > high {
			errs = append(errs, fmt.Errorf("%s=%q: expected a number from %d to %d", name, v, low, high))
		}
		return n
	}
	port := func(name, def string) string { return strconv.Itoa(number(name, def, 1, 65535)) }
	seconds := func(name, def string) time.Duration {
		return time.Duration(number(name, def, 0, 1<<31-1)) * time.Second
	}
	text := func(name string) string { v, _ := env(name); return v }

	serving := port("QUEUE_SERVING_PORT", portHTTP)
	c.listen = ":" + serving
	c.upstream = net.JoinHostPort("127.0.0.1", port("USER_PORT", "8080"))
	c.admin, c.stats, c.metrics = ":"+portAdmin, ":"+portStats, ":"+portMetrics
	c.concurrency = number("CONTAINER_CONCURRENCY", "0", 0, 1<<20)
	c.total = seconds("REVISION_TIMEOUT_SECONDS", "300")
	c.responseStart = seconds("REVISION_RESPONSE_START_TIMEOUT_SECONDS", "0")
	c.idle = seconds("REVISION_IDLE_TIMEOUT_SECONDS", "0")
	c.namespace, c.revision, c.instance = text("SERVING_NAMESPACE"), text("SERVING_REVISION"), text("SERVING_POD")

	var err error
	if c.probe, err = readProbe(text("SERVING_READINESS_PROBE")); err != nil {
		errs = append(errs, fmt.Errorf("SERVING_READINESS_PROBE: %w", err))
	}
	if serving == portHTTP2 {
		c.protocol = "h2c" // the port is named so in the revision
	}
	for _, i := range ignored {
		if v := text(i.name); !slices.Contains(i.nothing, v) {
			c.notes = append(c.notes, i.name+": "+i.what)
		}
	}
	return errs
}

// readProbe reads a Kubernetes probe, or a list with one; nothing is the TCP probe. A command cannot be run from
// here, the function's files are in another container: the instance's own runtime does that, and here the port has to be open.
func readProbe(text string) (*api.Probe, error) {
	p := &api.Probe{}
	if strings.TrimSpace(text) == "" {
		return p, nil
	}
	if strings.HasPrefix(strings.TrimSpace(text), "[") {
		var list []api.Probe
		if err := json.Unmarshal([]byte(text), &list); err != nil {
			return nil, err
		}
		if len(list) != 1 {
			return nil, fmt.Errorf("%d probes, expected one", len(list))
		}
		p = &list[0]
	} else if err := json.Unmarshal([]byte(text), p); err != nil {
		return nil, err
	}
	if p.Exec != nil {
		p.Exec, p.TCPSocket = nil, &api.TCPSocketAction{}
	}
	return p, nil
}

// proxy is the part of the configuration that the library takes.
func (c *config) proxy() queueproxy.Config {
	return queueproxy.Config{
		Revision:    api.MakeRevisionID(c.namespace, c.revision),
		Instance:    c.instance,
		Concurrency: c.concurrency,
		Queue:       c.queue,
		MaxWait:     c.maxWait,
	}
}
