package forward

import (
	"bytes"
	"net"
	"sync"
	"testing"
	"time"
)

type written struct {
	net.Conn
	mu     sync.Mutex
	n      int
	got    bytes.Buffer
	block  chan struct{}
	err    error
	closed bool
}

func (w *written) Write(p []byte) (int, error) {
	<-w.block
	w.mu.Lock()
	defer w.mu.Unlock()
	w.n++
	if w.err != nil {
		return 0, w.err
	}
	return w.got.Write(p)
}

func (w *written) Close() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.closed = true
	return nil
}

// Nothing is lost or changes its place, what comes while something is being written goes out together, and what waits is bounded.
func TestBatch(t *testing.T) {
	w := &written{block: make(chan struct{})}
	b := newBatch(w)
	var want bytes.Buffer
	piece := bytes.Repeat([]byte("0123456789abcdef"), 64)
	for range 2 * batchMax / len(piece) {
		piece[0]++
		want.Write(piece)
		b.mu.Lock()
		full := len(b.out) >= batchMax
		b.mu.Unlock()
		if full { // Write would wait for what is being written
			w.block <- struct{}{}
		}
		if _, err := b.Write(piece); err != nil {
			t.Fatal(err)
		}
	}
	close(w.block)
	b.flushed()
	w.mu.Lock()
	defer w.mu.Unlock()
	if !bytes.Equal(w.got.Bytes(), want.Bytes()) {
		t.Errorf("%d bytes, not the same %d", w.got.Len(), want.Len())
	}
	if w.n > 6 {
		t.Errorf("%d writes", w.n)
	}
}

// flushed returns when all has been written.
func (b *batch) flushed() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for len(b.out) > 0 && b.err == nil {
		b.room.Wait()
	}
	for b.writing {
		b.mu.Unlock()
		time.Sleep(time.Millisecond)
		b.mu.Lock()
	}
}

// After a failure the connection is closed and nobody waits.
func TestBatchFails(t *testing.T) {
	w := &written{block: make(chan struct{}), err: net.ErrClosed}
	b := newBatch(w)
	b.Write(make([]byte, batchMax))
	time.AfterFunc(5*time.Millisecond, func() { close(w.block) })
	for range 3 {
		b.Write(make([]byte, batchMax))
	}
	if _, err := b.Write([]byte("x")); err != net.ErrClosed {
		t.Error(err)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.closed {
		t.Error("not closed")
	}
}
