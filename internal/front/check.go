package front

import (
	"bytes"
	"strconv"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/chunk"
	"github.com/thawrun/thaw/internal/hop"
)

// check refuses what fasthttp's parser lets through although another parser may read it otherwise. It looks at the raw header, since
// the parsed one has forgotten what it threw away.
func (s *Server) check(h *fasthttp.RequestHeader) error {
	bad := func(status int, reason, msg string) error {
		return &hop.Error{Status: status, Reason: reason, Message: msg}
	}
	if p := h.Protocol(); !bytes.Equal(p, []byte("HTTP/1.1")) && !bytes.Equal(p, []byte("HTTP/1.0")) {
		return bad(505, hop.ReasonBadRequest, "HTTP version not supported: 1.0 and 1.1 are")
	}
	if h.IsConnect() {
		return bad(405, hop.ReasonMethod, "CONNECT is refused: this is not a forward proxy")
	}
	var te, cl, host, count int
	raw := h.RawHeaders()
	for len(raw) > 0 {
		line := raw
		if i := bytes.IndexByte(raw, '\n'); i >= 0 {
			line, raw = raw[:i], raw[i+1:]
		} else {
			raw = nil
		}
		line = bytes.TrimSuffix(line, []byte("\r"))
		if len(line) == 0 {
			continue
		}
		if count++; count > s.cfg.MaxHeaderLines {
			return bad(431, hop.ReasonHeaderTooBig, "more than "+strconv.Itoa(s.cfg.MaxHeaderLines)+" header lines")
		}
		colon := bytes.IndexByte(line, ':')
		if colon <= 0 {
			return bad(400, hop.ReasonBadRequest, "malformed header line")
		}
		if !chunk.Token(line[:colon]) {
			return bad(400, hop.ReasonBadRequest, "malformed header name")
		}
		if !chunk.Value(line[colon+1:]) {
			return bad(400, hop.ReasonBadRequest, "malformed header value")
		}
		switch name := line[:colon]; len(name) {
		case len("Transfer-Encoding"):
			if bytes.EqualFold(name, []byte("Transfer-Encoding")) {
				te++
				if !bytes.EqualFold(bytes.TrimSpace(line[colon+1:]), []byte("chunked")) {
					return bad(501, hop.ReasonBadRequest, "transfer coding not supported: only chunked is")
				}
			}
		case len("Content-Length"):
			if bytes.EqualFold(name, []byte("Content-Length")) {
				cl++
			}
		case len("Host"):
			if bytes.EqualFold(name, []byte("Host")) {
				host++
			}
		}
	}
	switch {
	case te > 0 && cl > 0:
		return bad(400, hop.ReasonBadRequest, "both Content-Length and Transfer-Encoding")
	case te > 1 || cl > 1 || host > 1:
		return bad(400, hop.ReasonBadRequest, "Transfer-Encoding, Content-Length or Host given twice")
	case te > 0 && !h.IsHTTP11():
		return bad(400, hop.ReasonBadRequest, "Transfer-Encoding in an HTTP/1.0 request")
	case !validHost(h.Host()):
		return bad(400, hop.ReasonBadRequest, "malformed Host")
	}
	return nil
}

// validHost says whether b has only bytes that a host and a port may have (RFC 3986 3.2.2).
func validHost(b []byte) bool {
	for _, c := range b {
		if !hostByte[c] {
			return false
		}
	}
	return true
}

var hostByte = func() (t [256]bool) {
	for c := '0'; c <= '9'; c++ {
		t[c] = true
	}
	for c := 'a'; c <= 'z'; c++ {
		t[c], t[c-'a'+'A'] = true, true
	}
	for _, c := range "-._~!$&'()*+,;=%:[]" {
		t[c] = true
	}
	return t
}()

// originForm turns the absolute form of a request's target, which a proxy must accept (RFC 9112 3.2.2), into path and Host.
func originForm(h *fasthttp.RequestHeader) error {
	uri := h.RequestURI()
	if len(uri) > 0 && uri[0] == '/' || len(uri) == 1 && uri[0] == '*' && h.IsOptions() {
		return nil
	}
	rest, ok := cutPrefixFold(uri, "http://")
	if !ok {
		rest, ok = cutPrefixFold(uri, "https://")
	}
	if !ok || len(rest) == 0 || rest[0] == '/' {
		return &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "malformed request target"}
	}
	host, path := string(rest), "/"
	if i := bytes.IndexAny(rest, "/?"); i >= 0 {
		host, path = string(rest[:i]), string(rest[i:])
		if path[0] == '?' {
			path = "/" + path
		}
	}
	if !validHost([]byte(host)) {
		return &hop.Error{Status: 400, Reason: hop.ReasonBadRequest, Message: "malformed Host"}
	}
	h.SetHost(host)
	h.SetRequestURI(path)
	return nil
}

func cutPrefixFold(b []byte, prefix string) ([]byte, bool) {
	if len(b) < len(prefix) || !bytes.EqualFold(b[:len(prefix)], []byte(prefix)) {
		return nil, false
	}
	return b[len(prefix):], true
}
