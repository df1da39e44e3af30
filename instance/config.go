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
	"github.com/thawrun/thaw/internal/endpoints"
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

// Config is what an agent needs to know. The zero value of everything but Dir is usable.
type Config struct {
	// Dir is the data folder. One agent at a time may use it. The agent keeps instances/, logs/, packages/ and the files
	// node-id and agent.lock there.
	Dir string

	// Log receives what an operator should know; nil = nothing.
	Log *slog.Logger

	// Sidecar makes the queue-proxy for an instance that has just been started (or adopted); it is not ready yet. It must not
	// call the agent. nil = none: then every instance counts as idle and is drained at once.
	Sidecar func(endpoints.Instance, *api.Revision) Sidecar

	// Images maps image references to local code; nil = only exec:// and pkg:// are known.
	Images code.Images

	// Packages bounds uploaded packages.
	Packages code.PackageLimits

	// Logs bounds what is kept of the functions' output. Dir and Log in it are set by the agent.
	Logs logs.Config

	// MaxStarts is how many instances may be between their exec and ready at once (an instance that takes longer than
	// 250 ms no longer counts); the others wait in order. More would only make all of them slower. Default: 4 per CPU.
	MaxStarts int

	// MaxInstances is how many instances this node runs at most. Beyond it a revision's snapshot shows the failure
	// NodeFull. Default: 1,000.
	MaxInstances int

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

	// MaxPIDs bounds processes and threads of one instance where cgroups allow it. Default: 0, no bound.
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
	if c.MaxInstances <= 0 {
		c.MaxInstances = 1000
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
	if c.FirstPort < 1 || c.LastPort > 65535 || c.LastPort-c.FirstPort < 1 {
		return c, fmt.Errorf("instance: ports %d to %d are not a range", c.FirstPort, c.LastPort)
	}
	if c.Path == "" {
		c.Path = os.Getenv("PATH")
	}
	if c.Path == "" {
		c.Path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	return c, nil
}
