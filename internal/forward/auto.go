package forward

import (
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/thawrun/thaw/internal/hop"
)

// learner finds out whether a function speaks HTTP/2 with prior knowledge, and remembers it until there is a sign that the function may have
// been replaced: a connection that it has closed, cannot be made, or breaks.
type learner struct {
	addr string
	wait time.Duration // for a connection, and for the answer to a preface

	mu    sync.Mutex
	known bool
	h2    bool
	ask   *asking // under way; the others wait for it
}

type asking struct {
	done chan struct{}
	h2   bool
	err  error
}

// errRelearn says that what was known may no longer be true; nothing was sent.
var errRelearn = errors.New("the function may have been replaced")

// serveAuto sends a request that came over HTTP/2 in the same way if the function takes it, everything else over HTTP/1.1.
func (f *Forward) serveAuto(x *hop.Exchange) error {
	if !x.HTTP2 {
		return f.serveH1(x)
	}
	for try := 0; ; try++ {
		h2, err := f.learn.speaksH2()
		if err != nil {
			return err
		}
		if h2 {
			err = f.h2.serve(x)
		} else {
			err = f.serveH1(x)
		}
		var e *hop.Error
		again := errors.Is(err, errRelearn) || // at most once for each connection that was kept
			try == 0 && errors.Is(err, hop.ErrNotSent) // that connection was just being closed
		if again || errors.Is(err, hop.ErrNotSent) || errors.As(err, &e) && e.Reason == hop.ReasonInstanceBroke {
			f.learn.forget()
		}
		if !again {
			return err
		}
	}
}

// doubt says whether a connection that the function has closed makes it worth while to ask again for x.
func (l *learner) doubt(x *hop.Exchange) bool { return l != nil && x.HTTP2 }

// forget makes the next request over HTTP/2 ask again.
func (l *learner) forget() {
	l.mu.Lock()
	l.known = false
	l.mu.Unlock()
}

// speaksH2 returns what is known, or asks; requests at the same time share one question.
func (l *learner) speaksH2() (bool, error) {
	l.mu.Lock()
	if l.known {
		defer l.mu.Unlock()
		return l.h2, nil
	}
	a := l.ask
	if a == nil {
		a = &asking{done: make(chan struct{})}
		l.ask = a
		l.mu.Unlock()
		a.h2, a.err = l.try()
		l.mu.Lock()
		l.ask, l.known, l.h2 = nil, a.err == nil, a.h2
		close(a.done)
	}
	l.mu.Unlock()
	<-a.done // bounded by the question's own limits
	return a.h2, a.err
}

// try says hello in HTTP/2 and looks whether the answer begins as RFC 9113 3.4 wants it: with a SETTINGS frame. A server of HTTP/1.1
// refuses the preface, which was made to look like a bad request to it, or says nothing.
func (l *learner) try() (bool, error) {
	c, err := net.DialTimeout("tcp", l.addr, l.wait)
	if err != nil {
		return false, fmt.Errorf("%w: %w", hop.ErrNotSent, err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(l.wait))
	const settings = 4 // frame type
	if _, err := io.WriteString(c, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"); err != nil {
		return false, nil
	}
	var head [9]byte
	if _, err := io.ReadFull(c, head[:]); err != nil {
		return false, nil
	}
	return head[0] == 0 && head[3] == settings && head[4] == 0 && head[5]|head[6]|head[7]|head[8] == 0, nil
}
