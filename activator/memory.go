package activator

import "runtime/debug"

// heldBytes is what a held request costs beside what it accounts for: its goroutine's stack, the connection's state, the sockets' buffers. Measured by
// bench/limiter.
const heldBytes = 13 << 10

// Totals without a memory limit.
const (
	totalWaiting = 100_000
	totalBytes   = 256 << 20
)

// DefaultTotals are the bounds over all queues in a process that may use so much memory: a quarter of it for what held requests carry, and a quarter
// for what holding costs; but not more than there is without a limit.
func DefaultTotals(memory int64) (waiting int, bytes int64) {
	return int(min(totalWaiting, max(100, memory/4/heldBytes))), min(totalBytes, max(1<<20, memory/4))
}

// memoryLimit is the process' soft limit (GOMEMLIMIT); math.MaxInt64 without one.
func memoryLimit() int64 { return debug.SetMemoryLimit(-1) }
