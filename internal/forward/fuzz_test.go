package forward

import (
	"bufio"
	"bytes"
	"net/http"
	"net/textproto"
	"strings"
	"testing"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/hop"
)

// Whatever a function's HTTP/2 answer has for fields, it is refused or is one head of HTTP/1.1 with that status and at most that field.
func FuzzAnswerHead(f *testing.F) {
	f.Add(200, "X-A", "b")
	f.Add(204, "Content-Length", "5")
	f.Add(302, "Location", "/a\r\nX-B: c")
	f.Add(103, "Link", "</a>; rel=preload")
	f.Add(999, "Set-Cookie", "a=b; Path=/")
	f.Add(500, "X A", "\t")
	f.Add(200, "Transfer-Encoding", "chunked")
	f.Fuzz(func(t *testing.T, code int, name, value string) {
		if code < 100 || code > 999 || !chunk.Token([]byte(name)) || !chunk.Value([]byte(value)) {
			return // net/http resets the stream
		}
		a := answerHeads.Get().(*answerHead)
		defer answerHeads.Put(a)
		if a.parse(code, http.Header{textproto.CanonicalMIMEHeaderKey(name): {value}}) != nil {
			return
		}
		head, _ := hop.Filter(a.resp.AppendBytes(nil))
		resp, err := http.ReadResponse(bufio.NewReader(bytes.NewReader(append(head, "\r\n"...))), &http.Request{Method: "GET"})
		if err != nil {
			t.Fatalf("%q: %q became %q: %v", name, value, head, err)
		}
		resp.Header.Del("Date") // made up by the way in which we look at it
		if resp.StatusCode != code || len(resp.Header) > 1 {
			t.Fatalf("%d, %q: %q became %q", code, name, value, head)
		}
		for k := range resp.Header {
			if hop.ConnectionOnly([]byte(k)) {
				t.Fatalf("%q is passed on", k)
			}
		}
	})
}

// h2c never stays in a list of protocols, and nothing comes in that was not there.
func FuzzUpgrade(f *testing.F) {
	for _, s := range []string{"h2c", "websocket", "H2C, websocket", "websocket,h2c,x", "", ",,h2c", " h2c ", "h2c/1"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, list string) {
		kept := withoutH2C(list)
		for p := range strings.SplitSeq(kept, ",") {
			if p = strings.TrimSpace(p); strings.EqualFold(p, "h2c") || !strings.Contains(list, p) {
				t.Fatalf("%q of %q", kept, list)
			}
		}
	})
}
