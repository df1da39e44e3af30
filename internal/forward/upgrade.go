package forward

import (
	"io"
	"net"
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/hop"
)

// switchProtocols hands an upgraded connection over: bytes both ways until both ends have closed, without a total limit.
func (f *Forward) switchProtocols(x *hop.Exchange, c *conn, up *upload, asked string) error {
	if asked == "" {
		up.stop(x, c)
		c.discard()
		x.Resp.Reset()
		return &hop.Error{Status: 502, Reason: hop.ReasonInstanceBroke, Message: "instance switched protocols without being asked"}
	}
	if !c.unfollow() {
		c.discard()
		x.Resp.Reset()
		return clientLeft()
	}
	h := &x.Resp.Header
	proto := string(h.Peek("Upgrade"))
	h.Set("Upgrade", proto)
	h.Set("Connection", "Upgrade")
	x.Resp.SkipBody = true
	idle := f.limits(x).Idle
	x.Hijack = func(client net.Conn) {
		defer c.discard()
		c.limit = time.Unix(1, 0) // so that none of the deadlines that pipe sets is taken back
		c.SetDeadline(time.Time{})
		pipe(client, c, idle)
	}
	return nil
}

// pipe copies both ways. One side's end is passed on as a half-close; an idle limit counts bytes of either direction.
func pipe(client net.Conn, c *conn, idle time.Duration) {
	touch := func() {
		if idle > 0 {
			t := time.Now().Add(idle)
			client.SetReadDeadline(t)
			c.SetReadDeadline(t)
		}
	}
	touch()
	one := func(dst net.Conn, src io.Reader) {
		bp := copyBuffers.Get().(*[]byte)
		defer copyBuffers.Put(bp)
		for {
			n, err := src.Read(*bp)
			if n > 0 {
				touch()
				if _, werr := dst.Write((*bp)[:n]); werr != nil {
					err = werr
				}
			}
			if err == io.EOF {
				if hc, ok := dst.(interface{ CloseWrite() error }); ok && hc.CloseWrite() == nil {
					return
				}
			}
			if err != nil {
				client.Close()
				c.Close()
				return
			}
		}
	}
	var wg sync.WaitGroup
	wg.Go(func() { one(c, client) })
	one(client, c.br)
	wg.Wait()
}
