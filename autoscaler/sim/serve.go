package sim

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
)

// ErrProtocol is wrapped by every error about what the simulator at the other end says.
var ErrProtocol = errors.New("line protocol")

// maxLine bounds one message, bytes: a tick of a hundred thousand functions.
const maxLine = 64 << 20

// Serve puts a policy behind the line protocol: one JSON object a line from in, one answer a line to out, until "end" or the end of in.
func Serve(in io.Reader, out io.Writer, p Policy) error {
	s := server{in: bufio.NewReaderSize(in, 1<<16), out: json.NewEncoder(out), policy: p}
	for n := 1; ; n++ {
		line, err := s.line()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			var done bool
			if done, err = s.answer(line); done {
				return nil
			}
		}
		if err != nil {
			return fmt.Errorf("line %d: %w", n, err)
		}
	}
}

type server struct {
	in        *bufio.Reader
	out       *json.Encoder
	policy    Policy
	buffer    []byte
	tick      Tick // reused
	functions int  // 0 = hello has not come
	last      float64
}

func (s *server) line() ([]byte, error) {
	s.buffer = s.buffer[:0]
	for {
		part, err := s.in.ReadSlice('\n')
		if len(s.buffer)+len(part) > maxLine {
			return nil, fmt.Errorf("%w: longer than %d bytes", ErrProtocol, maxLine)
		}
		s.buffer = append(s.buffer, part...)
		switch {
		case errors.Is(err, bufio.ErrBufferFull):
			continue
		case errors.Is(err, io.EOF) && len(s.buffer) > 0:
			return s.buffer, nil
		}
		return s.buffer, err
	}
}

// answer handles one message; done says that it was the last.
func (s *server) answer(line []byte) (done bool, err error) {
	var head struct {
		Type string `json:"type"`
	}
	if err := json.Unmarshal(line, &head); err != nil {
		return false, fmt.Errorf("%w: %v", ErrProtocol, err)
	}
	switch head.Type {
	case "hello":
		return false, s.hello(line)
	case "tick":
		return false, s.ticked(line)
	case "end":
		return true, nil
	}
	return false, fmt.Errorf("%w: a message of type %q; known are hello, tick and end", ErrProtocol, clip(head.Type))
}

func (s *server) hello(line []byte) error {
	var h Hello
	if err := json.Unmarshal(line, &h); err != nil {
		return fmt.Errorf("%w: hello: %v", ErrProtocol, err)
	}
	switch {
	case s.functions > 0:
		return fmt.Errorf("%w: a second hello", ErrProtocol)
	case h.Version != Version:
		return fmt.Errorf("%w: version %d, this program speaks version %d", ErrProtocol, h.Version, Version)
	case len(h.Functions) == 0 || len(h.Functions) > maxFunctions:
		return fmt.Errorf("%w: hello names %d functions: must be 1 to %d", ErrProtocol, len(h.Functions), maxFunctions)
	}
	for i, f := range h.Functions {
		if f.I != i || f.Concurrency < 1 {
			return fmt.Errorf("%w: hello: function %d at place %d with concurrency %d: must be numbered from 0, concurrency at least 1", ErrProtocol, f.I, i, f.Concurrency)
		}
	}
	s.functions = len(h.Functions)
	return s.out.Encode(s.policy.Hello(&h))
}

func (s *server) ticked(line []byte) error {
	t := &s.tick
	*t = Tick{Functions: t.Functions[:0], Calls: t.Calls[:0], Shifts: t.Shifts[:0]}
	clear(t.Functions[:cap(t.Functions)]) // fields that are left out are zero, not those of the last tick
	if err := json.Unmarshal(line, t); err != nil {
		return fmt.Errorf("%w: tick: %v", ErrProtocol, err)
	}
	if err := s.check(t); err != nil {
		return err
	}
	s.last = t.T
	orders := s.policy.Tick(t)
	if orders == nil {
		orders = []Order2{}
	}
	return s.out.Encode(Scale{Type: "scale", T: t.T, Orders: orders})
}

// check refuses numbers that no policy could use.
func (s *server) check(t *Tick) error {
	if s.functions == 0 {
		return fmt.Errorf("%w: a tick before hello", ErrProtocol)
	}
	if !(t.T >= s.last && t.T <= maxHorizon) {
		return fmt.Errorf("%w: tick at %v after one at %v: must be later, and at most %d", ErrProtocol, t.T, s.last, maxHorizon)
	}
	known := func(i int) bool { return i >= 0 && i < s.functions }
	for _, l := range t.Functions {
		if !known(l.I) || l.Arrivals < 0 || l.Done < 0 || l.Queued < 0 || l.Running < 0 || l.Ready < 0 || l.Starting < 0 || l.Target < 0 {
			return fmt.Errorf("%w: tick at %v: function %d is not known, or a number of it is negative", ErrProtocol, t.T, l.I)
		}
	}
	for _, c := range t.Calls {
		if !known(c[0]) || !known(c[1]) || c[2] < 0 {
			return fmt.Errorf("%w: tick at %v: calls %v between functions that are not known", ErrProtocol, t.T, c)
		}
	}
	for _, h := range t.Shifts {
		if !known(h.From) || !known(h.To) || !(h.Weight >= 0 && h.Weight <= 1) {
			return fmt.Errorf("%w: tick at %v: shift %+v of functions that are not known, or not of a share", ErrProtocol, t.T, h)
		}
	}
	return nil
}
