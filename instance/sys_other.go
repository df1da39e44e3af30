//go:build unix && !linux

package instance

import (
	"context"
	"io"
	"net"
	"os"
	"time"

	"github.com/thawrun/thaw/internal/placement"
)

func nap(d time.Duration) { time.Sleep(d) }

// tryConnect says whether somebody listens at addr.
func tryConnect(ctx context.Context, addr *net.TCPAddr) error {
	d := net.Dialer{Timeout: 100 * time.Millisecond}
	conn, err := d.DialContext(ctx, "tcp", addr.String())
	if err != nil {
		return err
	}
	return conn.Close()
}

// reserve has no means here; agents are kept apart by where in the range they begin.
func reserve(int) (io.Closer, error) { return io.NopCloser(nil), nil }

// accepting cannot be known here: whoever runs is taken to accept.
func accepting(*os.File) int { return 0 }

func machineMemory() (total, available int64) { return 0, 0 }

func machineResources() (r placement.Resources) { return r }

func memoryPressure() float64 { return 0 }
