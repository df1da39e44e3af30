package front

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math"
	"math/rand/v2"
	"strconv"
	"time"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

// Render turns an error into the platform's own answer. What is no *hop.Error is a step's refusal that nobody took over.
func Render(x *hop.Exchange, err error) {
	var e *hop.Error
	switch {
	case errors.As(err, &e):
	case errors.Is(err, hop.ErrBusy):
		e = &hop.Error{Status: 503, Reason: hop.ReasonQueueFull, Message: "pending request queue full", RetryAfter: time.Second}
	case errors.Is(err, hop.ErrNotSent):
		e = &hop.Error{Status: 502, Reason: hop.ReasonUnreachable, Message: err.Error()}
	default:
		e = &hop.Error{Status: 502, Reason: hop.ReasonInstanceBroke, Message: err.Error()}
	}
	writeError(x.Resp, e)
}

func writeError(r *fasthttp.Response, e *hop.Error) {
	r.Reset()
	r.SetStatusCode(e.Status)
	r.Header.Set("Content-Type", "text/plain; charset=utf-8")
	r.Header.Set("X-Content-Type-Options", "nosniff")
	r.Header.Set("X-Thaw-Error", e.Reason)
	if e.RetryAfter > 0 {
		r.Header.Set("Retry-After", strconv.Itoa(int(math.Ceil(e.RetryAfter.Seconds()))))
	}
	switch e.Status {
	case 400, 405, 408, 431, 501, 505: // what follows on the connection cannot be trusted to be a request
		r.SetConnectionClose()
	}
	r.SetBodyString(oneLine(e.Message) + "\n")
}

// oneLine keeps what a function said from writing more than its line.
func oneLine(s string) string {
	b := []byte(s)
	for i, c := range b {
		if c < ' ' || c == 0x7f {
			b[i] = ' '
		}
	}
	return string(b)
}

// requestID keeps a sane id of the caller's and makes one otherwise.
func requestID(given []byte) string {
	if n := len(given); n > 0 && n <= 128 {
		ok := true
		for _, c := range given {
			if c <= ' ' || c >= 0x7f || c == '"' || c == '\\' {
				ok = false
				break
			}
		}
		if ok {
			return string(given)
		}
	}
	var b [16]byte
	binary.LittleEndian.PutUint64(b[:], rand.Uint64())
	binary.LittleEndian.PutUint64(b[8:], rand.Uint64())
	var text [2 * len(b)]byte
	hex.Encode(text[:], b[:])
	return string(text[:])
}
