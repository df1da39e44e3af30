package forward

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"time"

	"github.com/thawrun/thaw/internal/hop"
)

// headerError names a refusal of the platform's own. A hop takes it off what a function answers, so that behind one it can be believed.
const headerError = "X-Thaw-Error"

// maxMessage is how much of a refusal's text is kept.
const maxMessage = 1 << 10

// refusal is what a hop in this process would have returned in place of the answer that another one gave: busy and not sent send the request
// elsewhere, if none of it has been used up, everything else is passed on as it was said.
func refusal(status int, reason, retryAfter string, message []byte, whole bool) error {
	text := string(bytes.TrimSpace(message))
	switch {
	case whole && reason == hop.ReasonQueueFull:
		return hop.ErrBusy
	case whole && (reason == hop.ReasonDraining || reason == hop.ReasonUnreachable):
		return fmt.Errorf("%w: %s", hop.ErrNotSent, text)
	}
	seconds, _ := strconv.Atoi(retryAfter)
	return &hop.Error{Status: status, Reason: reason, Message: text, RetryAfter: time.Duration(max(seconds, 0)) * time.Second}
}

// refused ends the exchange with a hop that answered with a refusal. Its text is short and comes with the head; else it is left away.
func (f *Forward) refused(x *hop.Exchange, c *conn, up *upload) error {
	h := &x.Resp.Header
	keep := !h.ConnectionClose() && up == nil
	up.stop(x, c)
	var text []byte
	if n := h.ContentLength(); n >= 0 && n <= maxMessage && c.br.Buffered() >= n {
		b, _ := c.br.Peek(n)
		text = bytes.Clone(b)
		_, _ = c.br.Discard(n)
	} else {
		keep = false
	}
	err := refusal(h.StatusCode(), string(h.Peek(headerError)), string(h.Peek("Retry-After")), text, up == nil)
	f.release(c, keep && c.br.Buffered() == 0)
	x.Resp.Reset()
	return err
}

// refused is the same over HTTP/2.
func (h *h2) refused(s *stream, resp *http.Response) error {
	text, _ := io.ReadAll(io.LimitReader(resp.Body, maxMessage))
	resp.Body.Close()
	s.end()
	return refusal(resp.StatusCode, resp.Header.Get(headerError), resp.Header.Get("Retry-After"), text, !s.up.touched())
}
