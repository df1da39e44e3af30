package instance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"time"
)

// portAhead is how many free ports are looked up before they are needed.
const portAhead = 32

// portTrust is how long a looked-up port is taken to be free without another look.
const portTrust = 5 * time.Second

// ports hands out free ports. A function binds its port itself, some time after it was told the number, so nothing can be
// reserved for it with the port itself. Other agents of the machine are kept away by a name in the kernel that goes with the
// number (reserve): two functions that were told the same port would be taken for each other, because who listens there
// counts as ready. Everybody else is kept away by a range outside the system's ephemeral ports and by using numbers
// in turn (a freed one comes back late).
type ports struct {
	first, last int
	ahead       chan freePort

	mu   sync.Mutex
	next int
	used map[int]io.Closer // reservations
}

type freePort struct {
	port int
	seen time.Time
}

var errNoPort = errors.New("no free port is left in the range for instances")

func newPorts(first, last int) *ports {
	return &ports{
		first: first, last: last, next: rand.IntN(last - first + 1),
		ahead: make(chan freePort, portAhead), used: map[int]io.Closer{},
	}
}

// run looks up ports ahead of their use until ctx ends.
func (p *ports) run(ctx context.Context) {
	defer func() {
		for {
			select {
			case f := <-p.ahead:
				p.put(f.port)
			default:
				return
			}
		}
	}()
	for {
		n, err := p.find()
		if err != nil {
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
				continue
			}
		}
		select {
		case p.ahead <- freePort{n, time.Now()}:
		case <-ctx.Done():
			p.put(n)
			return
		}
	}
}

// take returns a port that is free now, to be given back with put.
func (p *ports) take() (int, error) {
	for {
		select {
		case f := <-p.ahead:
			if time.Since(f.seen) < portTrust || isFree(f.port) {
				return f.port, nil
			}
			p.put(f.port)
		default:
			return p.find()
		}
	}
}

// claim marks the port of an adopted instance as used.
func (p *ports) claim(port int) {
	r, err := reserve(port)
	if err != nil {
		r = io.NopCloser(nil) // the function listens there: nobody else will find it free
	}
	p.mu.Lock()
	p.used[port] = r
	p.mu.Unlock()
}

func (p *ports) put(port int) {
	p.mu.Lock()
	r := p.used[port]
	delete(p.used, port)
	p.mu.Unlock()
	if r != nil {
		r.Close()
	}
}

// find goes round the range once at most.
func (p *ports) find() (int, error) {
	n := p.last - p.first + 1
	for range n {
		p.mu.Lock()
		port := p.first + p.next
		p.next = (p.next + 1) % n
		taken := p.used[port] != nil
		if !taken {
			r, err := reserve(port)
			if taken = err != nil; !taken {
				p.used[port] = r
			}
		}
		p.mu.Unlock()
		if taken {
			continue
		}
		if isFree(port) {
			return port, nil
		}
		p.put(port)
	}
	return 0, fmt.Errorf("%w (%d to %d)", errNoPort, p.first, p.last)
}

// isFree tries the port on all addresses, as most functions will.
func isFree(port int) bool {
	l, err := net.Listen("tcp", ":"+strconv.Itoa(port))
	if err != nil {
		return false
	}
	l.Close()
	return true
}
