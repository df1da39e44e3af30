package forward

import (
	"net"
	"runtime"
	"sync"

	"github.com/thawrun/thaw/internal/sock"
)

// batch is a connection whose writes go out together with those of others that can run now: net/http writes each head and each body by itself. An
// error is the next write's, and the reader's, whose connection is closed then.
type batch struct {
	net.Conn

	mu      sync.Mutex
	room    sync.Cond
	out     []byte // not written yet
	spare   []byte
	writing bool
	err     error
}

// batchMax is how much waits to be written before writers have to wait too.
const batchMax = 64 << 10

func newBatch(nc net.Conn) *batch {
	b := &batch{Conn: nc}
	if c := sock.NewConn(nc); c != nil {
		b.Conn = c
	}
	b.room.L = &b.mu
	return b
}

func (b *batch) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.out) >= batchMax && b.err == nil {
		b.room.Wait()
	}
	if b.err != nil {
		return 0, b.err
	}
	b.out = append(b.out, p...)
	if !b.writing {
		b.writing = true
		go b.write()
	}
	return len(p), nil
}

func (b *batch) write() {
	runtime.Gosched()
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.out) > 0 && b.err == nil {
		buf := b.out
		b.out, b.spare = b.spare[:0], nil
		b.mu.Unlock()
		_, err := b.Conn.Write(buf)
		b.mu.Lock()
		if b.spare = buf; err != nil {
			b.err = err
			b.Conn.Close()
		}
		b.room.Broadcast()
	}
	b.writing = false
	if cap(b.out)+cap(b.spare) > 16<<10 { // a connection that has nothing to say holds no large buffer
		b.out, b.spare = nil, nil
	}
}
