package hop

import (
	"bytes"
	"iter"
	"strings"

	"github.com/valyala/fasthttp"
)

// fasthttp fills the gap that a removed field leaves with the last one. Among lines of the same name the order has a meaning, so whoever
// removes fields from a parsed header does it by what is here.

var colon = []byte{':'}

// RawLines yields the lines of a header as they were parsed; of a header that was put together and not parsed, "Name" for each line.
func RawLines(h *fasthttp.RequestHeader) iter.Seq[[]byte] {
	return func(yield func([]byte) bool) {
		raw := h.RawHeaders()
		if len(raw) == 0 {
			for k := range h.All() {
				if !yield(k) {
					return
				}
			}
			return
		}
		for len(raw) > 0 {
			line := raw
			if i := bytes.IndexByte(raw, '\n'); i >= 0 {
				line, raw = raw[:i], raw[i+1:]
			} else {
				raw = nil
			}
			if len(line) > 0 && !yield(line) {
				return
			}
		}
	}
}

// Repeated are copies of lines whose names occur more than once, in order.
type Repeated []struct{ name, value []byte }

// RepeatedFields returns the lines whose name occurs more than once, but for those that are to be removed.
func RepeatedFields(h *fasthttp.RequestHeader, removed func(name []byte) bool) Repeated {
	var names [64][]byte
	n, twice := 0, false
	for line := range RawLines(h) {
		k, _, _ := bytes.Cut(line, colon)
		if n == len(names) {
			twice = true // too many to compare each with each: let the map find out
			break
		}
		for _, other := range names[:n] {
			twice = twice || len(other) == len(k) && bytes.EqualFold(other, k)
		}
		names[n] = k
		n++
	}
	if !twice {
		return nil
	}
	count := make(map[string]int)
	var out Repeated
	for line := range RawLines(h) {
		k, _, _ := bytes.Cut(line, colon)
		name := strings.ToLower(string(k))
		count[name]++
		if count[name] != 2 || removed(k) {
			continue
		}
		switch name {
		case "cookie", "connection", "trailer", "transfer-encoding", "host", "content-type", "content-length", "user-agent":
			continue // fasthttp has its own places for these, and their order says nothing
		}
		for _, v := range h.PeekAll(name) {
			out = append(out, struct{ name, value []byte }{[]byte(name), bytes.Clone(v)})
		}
	}
	return out
}

// Restore puts the lines back in their order, after others have been removed.
func (r Repeated) Restore(h *fasthttp.RequestHeader) {
	for _, f := range r {
		h.DelBytes(f.name)
	}
	for _, f := range r {
		h.AddBytesKV(f.name, f.value)
	}
}

// Remove takes out all fields with one of the names, which have the form that the header gives them, and leaves the others in their order.
func Remove(h *fasthttp.RequestHeader, names ...string) {
	again := RepeatedFields(h, func(name []byte) bool {
		for _, n := range names {
			if strings.EqualFold(n, string(name)) {
				return true
			}
		}
		return false
	})
	for _, n := range names {
		h.Del(n)
	}
	again.Restore(h)
}
