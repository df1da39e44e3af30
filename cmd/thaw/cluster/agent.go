package cluster

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"time"

	"google.golang.org/grpc"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/autoscaler/remote"
	"github.com/thawrun/thaw/cmd/thaw/gateways"
	"github.com/thawrun/thaw/cmd/thaw/proxies"
	"github.com/thawrun/thaw/cmd/thaw/side"
	"github.com/thawrun/thaw/cmd/thaw/slots"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/instance"
	"github.com/thawrun/thaw/instance/code"
	"github.com/thawrun/thaw/instance/logs"
	"github.com/thawrun/thaw/instance/store"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/feed"
	"github.com/thawrun/thaw/internal/front"
	"github.com/thawrun/thaw/internal/hop"
	"github.com/thawrun/thaw/internal/owners"
	"github.com/thawrun/thaw/internal/state"
	"github.com/thawrun/thaw/internal/telemetry"
	"github.com/thawrun/thaw/queueproxy"
)

// AgentConfig is one node. Dir is required.
type AgentConfig struct {
	Common
	Feed       string // address of the streams by which others learn of instances
	Dir        string // data folder of the node
	Store      string // URL of the zone's package store
	ImagesFile string // YAML map of image references to local code; "" = none
	PackageMiB int64  // bound of unpacked packages; 0 = 10 GiB
	Provider   string // as instance.Config.Provider
	Share      []string
	Capacity   int // units of instances that the node takes; 0 = what the machine has

	// Network is the node's way into networks of tenants; without a Device it has none.
	Network slots.Config
}

// inward is the node at the border of its process: it finds the queue-proxy of the instance that a request is for.
type inward struct {
	proxies  *proxies.Set
	stopping *atomic.Bool
}

// Serve answers x.
func (n *inward) Serve(x *hop.Exchange) error {
	id := string(x.Req.Header.Peek(headerInstance))
	p := n.proxies.Get(id)
	if p == nil {
		return &hop.Error{Status: 502, Reason: hop.ReasonUnreachable, Message: fmt.Sprintf("instance %.100q is not on this node", id)}
	}
	x.Req.Header.Del(headerInstance)
	takeLimits(x)
	s := queueproxy.Sidecar{Proxy: p, Stopping: n.stopping.Load}
	return s.Serve(x)
}

// Agent runs until ctx ends, then ends its instances.
func Agent(ctx context.Context, cfg AgentConfig, ready func(listen, metrics string)) error {
	if err := cfg.fill(); err != nil {
		return err
	}
	ln, err := listen("--listen", cfg.Listen, false)
	if err != nil {
		return err
	}
	defer ln.Close()
	requestsAt, err := cfg.advertised(ln)
	if err != nil {
		return err
	}
	feedLn, err := net.Listen("tcp", cfg.Feed)
	if err != nil {
		return fmt.Errorf("--feed: %w", err)
	}
	defer feedLn.Close()
	feedAt, err := cfg.advertised(feedLn)
	if err != nil {
		return err
	}
	images, err := loadImages(cfg.ImagesFile)
	if err != nil {
		return err
	}
	far, err := openStore(cfg.Store)
	if err != nil {
		return err
	}
	var queues proxies.Set
	var networks instance.Networks
	var network *slots.Node
	if cfg.Network.Device != "" {
		cfg.Network.Log = cfg.Log
		if network, err = slots.Open(cfg.Network); err != nil {
			return fmt.Errorf("networks of tenants: %w", err)
		}
		defer network.Close()
		networks = network
	}
	agent, err := instance.New(instance.Config{
		Dir: cfg.Dir, Log: cfg.Log, Images: images, Store: far, PackageBytes: cfg.PackageMiB << 20, Sidecar: queues.Open,
		Shutdown: cfg.Drain + 5*time.Second, Provider: cfg.Provider, Share: cfg.Share, Units: cfg.Capacity,
		Networks: networks,
	})
	if err != nil {
		return err
	}
	metrics, err := telemetry.New(func(w io.Writer) error { return queueproxy.WriteMetrics(w, queues.All()) })
	if err != nil {
		return err
	}
	if err := agent.Measure(metrics.Meter("instance")); err != nil {
		return err
	}
	st, err := state.Open(ctx, cfg.Etcd)
	if err != nil {
		return err
	}
	defer st.Close()
	units, _, _ := agent.Units()
	scaler := remote.NewClient(remote.ClientConfig{Name: cfg.Name, Agent: agent, Capacity: units, Log: cfg.Log})
	told := feed.NewServer(cfg.Log)
	agent.Subscribe(func(sn *endpoints.Snapshot) {
		out := abroad(sn, requestsAt)
		told.Observe(out) // first those whose requests wait
		scaler.Observe(out)
	})
	var stopping atomic.Bool
	sideServer := side.New(metrics, func() bool { return !stopping.Load() })
	sideServer.Handle("GET /logs", logsOf(agent))
	aside, sideAt, err := cfg.sideways(sideServer)
	if err != nil {
		return err
	}
	objs, all := objects.New(st, time.Now), 1
	if network != nil {
		all++
		alive := func(ctx context.Context) (map[string]string, error) { return owners.List(ctx, st, groupAgents) }
		if err := gateways.Join(ctx, st, cfg.Name, network.Where(), alive); err != nil {
			return fmt.Errorf("networks of tenants: %w", err)
		}
		if err := network.Measure(metrics.Meter("network")); err != nil {
			return err
		}
	}
	known := newSynced(all)
	fr := front.New(front.Config{Log: cfg.Log}, &inward{&queues, &stopping})
	lean := parts{
		"instances":   agent.Run,
		"metrics":     aside,
		"streams":     scaler.Run,
		"autoscalers": members(st, autoscalers, scaler.SetMembers),
		"feed": func(ctx context.Context) error {
			return told.Serve(ctx, func(g *grpc.Server) error { return g.Serve(feedLn) })
		},
		"reports": every(time.Second, func(now time.Time) {
			var stats []endpoints.Stat
			for _, p := range queues.All() {
				stats = append(stats, p.Report(now))
			}
			report(scaler, stats)
		}),
		"revisions": revisions(objs, cfg.Log, agent.SetRevision, agent.RemoveRevision, known.one),
	}
	if network != nil {
		lean["networks"] = func(ctx context.Context) error { return network.Run(ctx, objs, known.one) }
	}
	if sideAt != "" {
		_, port, _ := net.SplitHostPort(sideAt)
		host, _, _ := net.SplitHostPort(feedAt)
		lean["logs"] = cfg.join(st, groupSides, net.JoinHostPort(host, port))
	}
	return run(ctx, lean, func(ctx context.Context) error {
		known.wait(ctx)
		member, leave := context.WithCancel(ctx)
		joined := make(chan error, 1)
		go func() { joined <- cfg.join(st, groupAgents, feedAt)(member) }()
		defer func() { leave(); <-joined }()
		ready(ln.Addr().String(), sideAt)
		defer context.AfterFunc(ctx, func() { stopping.Store(true) })()
		return serveFront(ctx, fr, cfg.Drain, ln)
	})
}

// abroad is a snapshot as other machines see it: requests for an instance go to its node.
func abroad(sn *endpoints.Snapshot, addr string) *endpoints.Snapshot {
	out := *sn
	out.Instances = make([]endpoints.Instance, len(sn.Instances))
	for i, in := range sn.Instances {
		in.Addr = addr
		out.Instances[i] = in
	}
	return &out
}

// logsOf writes lines of the node's functions as NDJSON; with follow=true until the client leaves.
func logsOf(agent *instance.Agent) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		v := r.URL.Query()
		tail, _ := strconv.Atoi(v.Get("tail"))
		w.Header().Set("Content-Type", "application/x-ndjson")
		rc := http.NewResponseController(w)
		_ = rc.Flush()
		enc := json.NewEncoder(w)
		for line, err := range agent.Logs(r.Context(), logs.Query{
			Namespace: v.Get("namespace"), Service: v.Get("service"), Revision: v.Get("revision"), Instance: v.Get("instance"),
			Follow: v.Get("follow") == "true", Tail: tail,
		}) {
			if err != nil || enc.Encode(line) != nil {
				return
			}
			_ = rc.Flush()
		}
	})
}

func loadImages(file string) (code.Images, error) {
	if file == "" {
		return nil, nil
	}
	file, err := filepath.Abs(file)
	if err != nil {
		return nil, err
	}
	return code.LoadImages(file)
}

// openStore is the zone's package store; nil = the node's own folder, which nobody else can upload to.
func openStore(url string) (store.Store, error) {
	if url == "" {
		return nil, nil
	}
	s, err := store.NewRemote(url)
	if err != nil {
		return nil, fmt.Errorf("--store: %w", err)
	}
	return s, nil
}

// scaleOf is what a picture of all nodes says of a revision's scale.
func scaleOf(sn *endpoints.Snapshot) (id api.RevisionID, desired int, active bool) {
	return sn.Revision, sn.Desired, sn.Desired > 0 || sn.Count(endpoints.Ready)+sn.Count(endpoints.Starting) > 0
}
