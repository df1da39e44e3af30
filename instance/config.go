package instance

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"runtime"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/instance/code"
	"github.com/thawrun/thaw/instance/logs"
	"github.com/thawrun/thaw/instance/store"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/placement"
)

// Sidecar is the queue-proxy in front of one instance.
type Sidecar interface {
	// InFlight returns the requests inside the instance and waiting in front of it. It must not block.
	InFlight() int
	// Drain lets nothing new in and returns when the last request is out, or with an error when ctx ends before.
	Drain(ctx context.Context) error
	// Close is called once, after the instance has ended.
	Close()
}

// Networks are the networks of tenants that instances on this node can be attached to.
type Networks interface {
	// Attach returns a network namespace that reaches a subnet (VPC/SUBNET, of a namespace of objects), for one instance. It takes
	// microseconds and asks nobody. The caller closes the namespace; it is given back by itself when nobody is in it any
	// more, so that an agent may end in between.
	Attach(namespace, subnet string) (*os.File, error)
}

// Config is what an agent needs to know. The zero value of everything but Dir is usable.
type Config struct {
	// Dir is the data folder. One agent at a time may use it. The agent keeps instances/, logs/, packages/, store/ and the files
	// node-id and agent.lock there.
	Dir string

	// Log receives what an operator should know; nil = nothing.
	Log *slog.Logger

	// Sidecar makes the queue-proxy for an instance that has just been started (or adopted); it is not ready yet. It must not
	// call the agent. dial connects to the instance, nil = Addr is good for anybody. nil = none: then every instance counts as idle and is drained
	// at once.
	Sidecar func(in endpoints.Instance, rev *api.Revision, dial Dialer) Sidecar

	// Images maps image references to local code; nil = only exec:// and pkg:// are known.
	Images code.Images

	// Packages bounds uploaded packages.
	Packages code.PackageLimits

	// PackageBytes is how much unpacked packages may take on this node before those that no revision here uses go, the longest
	// unused first. Default: 10 GiB.
	PackageBytes int64

	// Store is where packages are kept as they were uploaded. nil = the folder store/ in Dir.
	Store store.Store

	// Networks lets instances into the networks of tenants. nil = there are none: a revision that wants one does not start.
	Networks Networks

	// Logs bounds what is kept of the functions' output. Dir and Log in it are set by the agent.
	Logs logs.Config

	// MaxStarts is how many instances may be between their exec and ready at once (an instance that takes longer than
	// 250 ms no longer counts); the others wait in order. More would only make all of them slower. Default: 4 per CPU.
	MaxStarts int

	// Units is how many units of instances (placement.ClassOf) this node takes. Beyond them a revision's snapshot shows the failure
	// NodeFull. Default: what the machine has.
	Units int

	// FrozenFor is how long an instance that is not needed any more is kept frozen; a revision may say otherwise. 0 = it ends at once.
	FrozenFor time.Duration

	// FrozenMax and FrozenBytes bound the frozen instances of this node; beyond them the oldest end. They count among Units, and
	// make room there. Default: 500, and a tenth of the machine's memory.
	FrozenMax   int
	FrozenBytes int64

	// BlankBytes is what interpreters that wait for a function may take in all. Default: a fortieth of the machine's memory.
	BlankBytes int64

	lowMemory func() bool // memoryIsLow, but for tests

	// Grace is the longest time between SIGTERM and SIGKILL; a revision with a shorter timeoutSeconds gets that. Default: 30 s.
	Grace time.Duration

	// Shutdown is how long ending all instances may take when Run's context ends: six tenths of it for requests to finish,
	// the rest for SIGTERM; then SIGKILL. Default: 20 s.
	Shutdown time.Duration

	// AdoptWithin is how long instances of a predecessor may wait for their revision to be set before they are ended.
	// Default: 30 s.
	AdoptWithin time.Duration

	// FirstPort and LastPort are the range of ports that are given to instances. It should lie outside the range that the
	// system takes ports for outgoing connections from. Default: 20000 to 32767.
	FirstPort, LastPort int

	// Path is PATH of the functions. Default: PATH of this process.
	Path string

	// Provider is what runs the instances: "process", "sandbox" (Linux, root), or "auto": sandboxes where they can be had, else
	// processes. Default: "auto".
	Provider string

	// Share are folders of this machine that functions in sandboxes may read, beside their code and the system's.
	Share []string

	// MaxPIDs bounds processes and threads of one instance where cgroups allow it. Default: 0, no bound; 1,024 in sandboxes.
	MaxPIDs int64
}

func (c Config) withDefaults() (Config, error) {
	if c.Dir == "" {
		return c, errors.New("instance: Config.Dir is empty")
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.MaxStarts <= 0 {
		c.MaxStarts = 4 * runtime.NumCPU()
	}
	if c.FrozenMax <= 0 {
		c.FrozenMax = 500
	}
	if c.FrozenBytes <= 0 {
		total, _ := machineMemory()
		c.FrozenBytes = max(total/10, 64<<20)
	}
	if c.lowMemory == nil {
		c.lowMemory = memoryIsLow
	}
	if c.BlankBytes <= 0 {
		total, _ := machineMemory()
		c.BlankBytes = max(total/40, 64<<20)
	}
	if c.Grace <= 0 {
		c.Grace = 30 * time.Second
	}
	if c.Shutdown <= 0 {
		c.Shutdown = 20 * time.Second
	}
	if c.AdoptWithin <= 0 {
		c.AdoptWithin = 30 * time.Second
	}
	if c.FirstPort == 0 && c.LastPort == 0 {
		c.FirstPort, c.LastPort = 20000, 32767
	}
	if c.Units < 0 || c.Units > placement.MaxUnits {
		return c, fmt.Errorf("instance: %d units; a node has 1 to %d", c.Units, placement.MaxUnits)
	}
	if c.FirstPort < 1 || c.LastPort > 65535 || c.LastPort-c.FirstPort < 1 {
		return c, fmt.Errorf("instance: ports %d to %d are not a range", c.FirstPort, c.LastPort)
	}
	if c.Provider == "" {
		c.Provider = "auto"
	}
	if c.Path == "" {
		c.Path = os.Getenv("PATH")
	}
	if c.Path == "" {
		c.Path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	return c, nil
}
