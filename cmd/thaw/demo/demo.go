// Package demo is `thaw demo`: it starts everything, lets people watch a function wake from zero, scale with a burst, change
// its version and go back to sleep, and sums up what was measured. All of it is real; nothing is timed for show.
package demo

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"

	vegeta "github.com/tsenart/vegeta/v12/lib"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler"
	"github.com/thawrun/thaw/cmd/thaw/dev"
	"github.com/thawrun/thaw/internal/client"
)

// Config says how to run the demo.
type Config struct {
	Keep    bool   // leave it running afterwards, until ctx ends
	Listen  string // ingress; "" = a free port, with Keep 127.0.0.1:8080
	API     string // likewise; 127.0.0.1:8081
	Out     io.Writer
	Log     io.Writer // the server's own log, nil = warnings only, to Out
	Version string
}

// Function is the argument with which this program becomes the demo's sample function.
const Function = "demo-function"

// RunFunction serves the sample: it takes about 20 ms for a request and says who it is.
func RunFunction(ctx context.Context) error {
	ln, err := net.Listen("tcp", ":"+os.Getenv("PORT"))
	if err != nil {
		return err
	}
	srv := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		time.Sleep(20 * time.Millisecond) // the function's work
		fmt.Fprintf(w, "%s from %s\n", os.Getenv("GREETING"), os.Getenv("K_REVISION"))
	})}
	go func() {
		<-ctx.Done()
		end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 5*time.Second)
		defer cancel()
		srv.Shutdown(end)
	}()
	if err := srv.Serve(ln); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

const name, host = "hello", "hello.default.localhost"

// Run runs the demo.
func Run(ctx context.Context, cfg Config) (err error) {
	d := &demo{cfg: cfg, out: cfg.Out}
	dir, err := os.MkdirTemp("", "thaw-demo-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	listen, apiAddr := cfg.Listen, cfg.API
	if listen == "" {
		listen = map[bool]string{true: "127.0.0.1:8080", false: "127.0.0.1:0"}[cfg.Keep]
	}
	if apiAddr == "" {
		apiAddr = map[bool]string{true: "127.0.0.1:8081", false: "127.0.0.1:0"}[cfg.Keep]
	}
	log := slog.New(slog.NewTextHandler(cfg.Out, &slog.HandlerOptions{Level: slog.LevelError}))
	if cfg.Log != nil {
		log = slog.New(slog.NewTextHandler(cfg.Log, nil))
	}
	scaling, err := autoscaler.ParseConfig(map[string]string{"stable-window": "6s", "scale-to-zero-grace-period": "6s"})
	if err != nil {
		return err
	}

	d.head("Start")
	begin := time.Now()
	d.srv, err = dev.Start(context.WithoutCancel(ctx), dev.Config{Listen: listen, API: apiAddr, Dir: dir, Version: cfg.Version, Log: log, Scaling: &scaling})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.srv.Stop()) }()
	if d.client, err = client.New(client.Config{Server: "http://" + d.srv.API, Token: d.srv.Token}); err != nil {
		return err
	}
	defer d.client.CloseIdle()
	d.say("router, activator, autoscaler, API server and embedded etcd run in this process after %v", ms(time.Since(begin)))
	d.say("ingress http://%s, API http://%s", d.srv.Ingress, d.srv.API)

	for _, step := range []func(context.Context) error{d.deploy, d.wake, d.burst, d.release, d.sleep} {
		if err := step(ctx); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	d.summary(time.Since(begin))
	if cfg.Keep {
		d.head("Left running")
		d.say("call it:   curl http://%s.default.localhost:%s/", name, port(d.srv.Ingress))
		d.say("look at it: thaw list --api http://%s --data %s", d.srv.API, dir)
		d.say("Ctrl-C ends it")
		<-ctx.Done()
	}
	return nil
}

type demo struct {
	cfg    Config
	out    io.Writer
	srv    *dev.Server
	client *client.Client

	total         vegeta.Metrics
	coldTotal     time.Duration
	coldPlatform  time.Duration
	coldRequests  int
	maxInstances  int
	fiveInstances time.Duration // from the burst's first request to the fifth instance
	zero          time.Duration
}

func (d *demo) head(s string) { fmt.Fprintf(d.out, "\n== %s\n", s) }

func (d *demo) say(format string, args ...any) { fmt.Fprintf(d.out, "   "+format+"\n", args...) }

func ms(d time.Duration) string {
	return strconv.FormatFloat(float64(d.Microseconds())/1000, 'f', 1, 64) + " ms"
}

func port(addr string) string { _, p, _ := net.SplitHostPort(addr); return p }

// apply deploys the sample with a greeting, which makes a revision.
func (d *demo) apply(ctx context.Context, greeting, traffic string) error {
	exe, err := os.Executable()
	if err != nil {
		return err
	}
	doc := fmt.Sprintf(`{"apiVersion":"serving.knative.dev/v1","kind":"Service","metadata":{"name":%q},"spec":{"template":{
		"metadata":{"annotations":{"autoscaling.knative.dev/initial-scale":"0","autoscaling.knative.dev/max-scale":"12"}},
		"spec":{"containerConcurrency":10,"containers":[{"image":%q,"args":[%q],"env":[{"name":"GREETING","value":%q}]}]}},"traffic":[%s]}}`,
		name, "exec://"+exe, Function, greeting, traffic)
	wait, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if _, _, err := d.client.Apply(wait, api.Services, "default", name, []byte(doc)); err != nil {
		return err
	}
	_, err = d.client.WaitReady(wait, api.Services, "default", name, client.WaitOptions{})
	return err
}

const latest = `{"latestRevision":true,"percent":100}`

func (d *demo) deploy(ctx context.Context) error {
	d.head("Deploy a Knative Service with no instance")
	begin := time.Now()
	if err := d.apply(ctx, "hello", latest); err != nil {
		return err
	}
	d.say("service %q ready at http://%s:%s after %v: 10 requests at once per instance, at most 12 instances, none running", name, host, port(d.srv.Ingress), ms(time.Since(begin)))
	return nil
}

// call sends one request, by address, so that no name service is needed.
func (d *demo) call(ctx context.Context) (*http.Response, string, error) {
	req, err := http.NewRequestWithContext(ctx, "GET", "http://"+d.srv.Ingress+"/", nil)
	if err != nil {
		return nil, "", err
	}
	req.Host = host
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return nil, "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return resp, strings.TrimSpace(string(b)), err
}

func (d *demo) wake(ctx context.Context) error {
	d.head("One request wakes it")
	begin := time.Now()
	resp, body, err := d.call(ctx)
	if err != nil {
		return err
	}
	d.coldTotal = time.Since(begin)
	if resp.StatusCode != 200 {
		return fmt.Errorf("the first request was answered %d: %s", resp.StatusCode, body)
	}
	d.say("%q after %v; where the time went:", body, ms(d.coldTotal))
	own := d.waterfall(resp.Header.Get("Server-Timing"))
	d.coldPlatform = d.coldTotal - own
	d.say("the platform's share is %v; ready and app are the function's own time", ms(d.coldPlatform))
	begin = time.Now()
	if resp, body, err = d.call(ctx); err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("the second request was answered %d: %s", resp.StatusCode, body)
	}
	if err != nil {
		return err
	}
	d.say("the next request finds it awake: %v, 20 ms of them the function's work", ms(time.Since(begin)))
	return nil
}

// waterfall draws the phases and returns the function's own part.
func (d *demo) waterfall(header string) (own time.Duration) {
	v := map[string]float64{}
	sum := 0.0
	for part := range strings.SplitSeq(header, ",") {
		k, dur, _ := strings.Cut(strings.TrimSpace(part), ";dur=")
		v[k], _ = strconv.ParseFloat(dur, 64)
		sum += v[k]
	}
	const width = 48
	at := 0.0
	for _, k := range []string{"decide", "place", "code", "net", "create", "ready", "queue", "app"} {
		from, to := int(at/sum*width), int((at+v[k])/sum*width+0.5)
		at += v[k]
		d.say("  %-7s %8.2f ms  %s%s", k, v[k], strings.Repeat(" ", max(0, from)), strings.Repeat("#", max(1, to-from)))
	}
	return time.Duration((v["ready"] + v["app"]) * float64(time.Millisecond))
}

// attack sends an open-loop load and watches the scaling meanwhile.
func (d *demo) attack(ctx context.Context, p vegeta.Pacer, length time.Duration, revision string) *vegeta.Metrics {
	target := vegeta.NewStaticTargeter(vegeta.Target{Method: "GET", URL: "http://" + d.srv.Ingress + "/", Header: http.Header{"Host": {host}}})
	at := vegeta.NewAttacker(vegeta.Timeout(30*time.Second), vegeta.MaxWorkers(2000), vegeta.Connections(2000))
	defer at.Stop()
	begin := time.Now()
	stop := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() { d.watch(begin, revision, stop) })
	var m vegeta.Metrics
	for r := range at.Attack(target, p, length, name) {
		m.Add(r)
		d.total.Add(r)
		if r.Headers.Get("Server-Timing") != "" {
			d.coldRequests++
		}
		if ctx.Err() != nil {
			at.Stop()
		}
	}
	close(stop)
	watch.Wait()
	m.Close()
	return &m
}

// watch prints a line whenever the number of instances has changed, until stop.
func (d *demo) watch(begin time.Time, revision string, stop <-chan struct{}) {
	id := api.MakeRevisionID("default", revision)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	last, printed := -1, time.Time{}
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		st, _ := d.srv.Status(id)
		d.maxInstances = max(d.maxInstances, st.Ready)
		if st.Ready >= 5 && d.fiveInstances == 0 {
			d.fiveInstances = time.Since(begin)
		}
		if n := st.Ready + 1000*st.Starting; n != last && time.Since(printed) > 100*time.Millisecond {
			last, printed = n, time.Now()
			d.say("  %6.2f s  %-12s %2d ready, %2d starting   %s  %s", time.Since(begin).Seconds(), bar(st.Ready, st.Starting), st.Ready, st.Starting, st.Mode, st.Why)
		}
	}
}

func bar(ready, starting int) string {
	return strings.Repeat("#", ready) + strings.Repeat(".", starting)
}

func (d *demo) burst(ctx context.Context) error {
	d.head("A burst: from nothing much to 800 requests a second, for 5 seconds (vegeta, open loop)")
	m := d.attack(ctx, vegeta.Rate{Freq: 800, Per: time.Second}, 5*time.Second, name+"-00001")
	d.say("%d requests, %.2f %% answered 200; p50 %v, p99 %v, slowest %v", m.Requests, m.Success*100, ms(m.Latencies.P50), ms(m.Latencies.P99), ms(m.Latencies.Max))
	return nil
}

func (d *demo) release(ctx context.Context) error {
	d.head("A new revision, 20 % first, then all, under load")
	errs := make(chan error, 1)
	go func() {
		errs <- errors.Join(
			d.apply(ctx, "good day", `{"revisionName":"hello-00001","percent":80},{"latestRevision":true,"percent":20}`),
			d.count(ctx),
			d.apply(ctx, "good day", latest),
			d.count(ctx))
	}()
	m := d.attack(ctx, vegeta.Rate{Freq: 300, Per: time.Second}, 4*time.Second, name+"-00002")
	err := <-errs
	d.say("%d requests meanwhile, %.2f %% answered 200", m.Requests, m.Success*100)
	return err
}

// count shows who answers.
func (d *demo) count(ctx context.Context) error {
	var mu sync.Mutex
	got := map[string]int{}
	var wg sync.WaitGroup
	var errs error
	for range 10 {
		wg.Go(func() {
			for range 20 {
				resp, body, err := d.call(ctx)
				if err == nil && resp.StatusCode != http.StatusOK {
					err = fmt.Errorf("a request was answered %d: %s", resp.StatusCode, body)
				}
				mu.Lock()
				got[body]++
				errs = errors.Join(errs, err)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	b, _ := json.Marshal(got)
	d.say("200 answers: %s", b)
	return errs
}

func (d *demo) sleep(ctx context.Context) error {
	d.head("No load: back to nothing (windows of 6 s; Knative's defaults are 60 s and 30 s of grace)")
	begin := time.Now()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	last := -1
	for {
		a, _ := d.srv.Status("default/" + name + "-00001")
		b, _ := d.srv.Status("default/" + name + "-00002")
		if n := a.Ready + b.Ready; n != last {
			last = n
			d.say("  %6.2f s  %-12s %2d ready", time.Since(begin).Seconds(), bar(n, 0), n)
		}
		if last == 0 {
			d.zero = time.Since(begin)
			return nil
		}
		if time.Since(begin) > 40*time.Second {
			return fmt.Errorf("%d instances are still there after 40 s without load", last)
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

func (d *demo) summary(took time.Duration) {
	d.total.Close()
	d.head("Summary")
	d.say("%-38s %v, of them %v the platform's", "cold start, request to answer", ms(d.coldTotal), ms(d.coldPlatform))
	d.say("%-38s %d of %d (%d failed)", "load requests answered 200", d.total.StatusCodes["200"], d.total.Requests, int(d.total.Requests)-d.total.StatusCodes["200"])
	d.say("%-38s %v / %v", "their latency, p50 / p99", ms(d.total.Latencies.P50), ms(d.total.Latencies.P99))
	d.say("%-38s %d", "of them waited for a start", d.coldRequests)
	five := "not reached"
	if d.fiveInstances > 0 {
		five = ms(d.fiveInstances)
	}
	d.say("%-38s %d, the fifth after %s", "most instances at once", d.maxInstances, five)
	d.say("%-38s %.1f s", "from the last request to zero instances", d.zero.Seconds())
	d.say("%-38s %.1f s", "the whole demo", took.Seconds())
}
