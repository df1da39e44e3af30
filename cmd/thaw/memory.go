package main

import (
	"context"
	"os"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

// limitMemory makes nine tenths of what the process' cgroup may use the soft limit of Go's memory, unless GOMEMLIMIT says another: a container is
// not killed for garbage, and the bounds of queues follow it. Without a limit, or without cgroups, nothing changes.
func limitMemory(provider memlimit.Provider) {
	_, _ = memlimit.SetGoMemLimitWithOpts(memlimit.WithProvider(provider), memlimit.WithRatio(0.9))
}

// Bounds of keepSmall.
const (
	headroom   = 4 << 20 // bytes of garbage that a small heap may carry
	minPercent = 20      // of the live heap: what a large one may carry at least
	maxPercent = 75
	quietBytes = 1 << 20 // allocated in a look: below it nobody asks anything of the process
	quietLooks = 5       // in a row: then the memory of what was before goes back
)

// keepSmall keeps an idle process small until ctx ends; whoever sets GOGC or GOMEMLIMIT knows better, and it does nothing.
//
// Garbage is bounded by an amount rather than by a share of the heap, because what lives long is strewn over all memory that was in
// use when it was made, and Go moves nothing: a thousand services deployed at once would hold twice what they need for ever.
// And once the process has become quiet, free memory goes back to the system at once; Go's own scavenger would keep a part of it.
func keepSmall(ctx context.Context) {
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	debug.SetGCPercent(maxPercent)
	read := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/heap/allocs:bytes"}}
	metrics.Read(read)
	percent, quiet, before := maxPercent, 0, read[1].Value.Uint64()
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		metrics.Read(read)
		live, allocated := read[0].Value.Uint64(), read[1].Value.Uint64()
		if p := percentFor(live); p != percent {
			percent = p
			debug.SetGCPercent(p)
		}
		if allocated-before > quietBytes {
			quiet = 0
		} else if quiet++; quiet == quietLooks {
			runtime.GC() // pools let go of what they hold at the second collection
			debug.FreeOSMemory()
		}
		before = allocated
	}
}

// percentFor is the GC percentage that leaves a live heap its headroom.
func percentFor(live uint64) int {
	if live == 0 {
		return maxPercent // no collection yet
	}
	return int(min(maxPercent, max(minPercent, headroom*100/live)))
}
