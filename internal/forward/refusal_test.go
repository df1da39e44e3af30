package forward_test

import (
	"errors"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/internal/forward"
	"github.com/thawrun/thaw/internal/hop"
)

// What a hop refuses comes back as if it were in this process; a function that says the same is not believed.
func TestRefusals(t *testing.T) {
	for _, c := range []struct {
		status      int
		reason      string
		body        string // of the request
		busy, again bool
	}{
		{503, hop.ReasonQueueFull, "", true, false},
		{503, hop.ReasonQueueFull, "small", true, false},
		{503, hop.ReasonQueueFull, strings.Repeat("x", 1<<20), false, false}, // a part of it has gone
		{503, hop.ReasonDraining, "", false, true},
		{502, hop.ReasonUnreachable, "", false, true},
		{502, hop.ReasonInstanceBroke, "", false, false},
		{504, hop.ReasonTimeout, "", false, false},
		{200, "", "", false, false},
	} {
		for _, protocol := range []string{"h1", "h2c"} {
			for _, isHop := range []bool{true, false} {
				f := newForward(t, forward.Config{Protocol: protocol, Hop: isHop, Addr: function(t, protocol == "h2c", func(w http.ResponseWriter, r *http.Request) {
					if c.reason != "" {
						w.Header().Set("X-Thaw-Error", c.reason)
						w.Header().Set("Retry-After", "7")
					}
					io.CopyN(io.Discard, r.Body, 100_000)
					w.WriteHeader(c.status)
					io.WriteString(w, "the reason in words\n")
				})})
				saw := make(chan error, 10)
				addr := serve(t, hop.HandlerFunc(func(x *hop.Exchange) error {
					err := f.Serve(x)
					saw <- err
					return err
				}))
				// A reader of its own: the transport may still read it after Post has returned.
				resp, err := http.Post("http://"+addr, "text/plain", strings.NewReader(c.body))
				name := protocol + " " + c.reason
				if err != nil {
					if len(c.body) < 1<<20 {
						t.Errorf("%s: %v", name, err)
					}
					continue // the rest of a large body was not wanted
				}
				resp.Body.Close()
				seen := <-saw // the answer may be here before Serve has returned
				var e *hop.Error
				switch {
				case !isHop || c.reason == "":
					if seen != nil || resp.StatusCode != c.status {
						t.Errorf("%s, no hop: %v, %d", name, seen, resp.StatusCode)
					}
				case c.busy != errors.Is(seen, hop.ErrBusy) || c.again != errors.Is(seen, hop.ErrNotSent):
					t.Errorf("%s: %v", name, seen)
				case !c.busy && !c.again && (!errors.As(seen, &e) || e.Status != c.status || e.Reason != c.reason || e.Message != "the reason in words" || e.RetryAfter != 7*time.Second):
					t.Errorf("%s: %+v", name, seen)
				}
			}
		}
	}
}
