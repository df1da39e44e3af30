package ctsync

import (
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
)

// Census is what a table holds at a moment.
type Census struct {
	Entries int // of TCP, UDP and ICMP over IPv4
	Live    int // those that carry something yet: not TCP connections that have ended, nor ICMP
	Open    int // TCP connections that both ends have opened, and neither has closed
	// Busiest is how many entries lead, from one address after translation, to one address and port. That many ports they use.
	Busiest int
}

// Survey counts a namespace's table by reading all of it: half a microsecond and more for each entry.
func Survey(table *link.Namespace) (c Census, err error) {
	err = table.Do(func() error {
		k, err := openKernel(func(unix.Errno) {})
		if err != nil {
			return err
		}
		defer k.close()
		w, err := k.walk()
		if err != nil {
			return err
		}
		defer w.close()
		type way struct {
			from, to [4]byte
			port     uint16
			proto    uint8
		}
		used := map[way]int{}
		for more := true; more; {
			var list []Change
			if list, more, err = w.next(list); err != nil {
				return fmt.Errorf("survey: %w", err)
			}
			for i := range list {
				e := &list[i].Entry
				c.Entries++
				if e.live() {
					c.Live++
				}
				if e.open() {
					c.Open++
				}
				if e.Proto != icmp {
					at := way{e.Reply.Dst, e.Orig.Dst, e.Orig.DPort, e.Proto}
					used[at]++
					c.Busiest = max(c.Busiest, used[at])
				}
			}
		}
		return nil
	})
	return c, err
}

// live says whether a connection has not ended.
func (e *Entry) live() bool {
	const timeWait, closed = 7, 8 // enum tcp_conntrack
	return e.Proto == udp || e.Proto == tcp && e.TCP.State != timeWait && e.TCP.State != closed
}

func (e *Entry) open() bool {
	const established = 3
	return e.Proto == tcp && e.TCP.State == established
}
