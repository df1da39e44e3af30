package main

import (
	"math"
	"os"
	"runtime/debug"
	"testing"

	"github.com/KimMachineGun/automemlimit/memlimit"
)

// The cgroup's limit becomes the process', unless somebody has said another.
func TestLimitMemory(t *testing.T) {
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(-1))
	for _, c := range []struct {
		given string
		want  int64
	}{{"", 9 << 30 / 10}, {"1GiB", math.MaxInt64}} { // the runtime has read GOMEMLIMIT before; here it stays as it was
		if t.Setenv("GOMEMLIMIT", c.given); c.given == "" {
			os.Unsetenv("GOMEMLIMIT")
		}
		debug.SetMemoryLimit(math.MaxInt64)
		limitMemory(memlimit.Limit(1 << 30))
		if got := debug.SetMemoryLimit(-1); got < c.want-1 || got > c.want {
			t.Errorf("GOMEMLIMIT=%q: limit %d, want %d", c.given, got, c.want)
		}
	}
}
