//go:build unix && !linux

package instance

import (
	"context"
	"net"
	"time"
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
