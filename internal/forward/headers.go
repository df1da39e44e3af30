package forward

import (
	"bytes"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

// Fields that concern one connection only (RFC 9110 7.6.1 and the ones of old that proxies honour). Transfer-Encoding and
// Content-Length are written anew by the header itself.
var hopByHop = []string{"Connection", "Keep-Alive", "Proxy-Connection", "Proxy-Authenticate", "Proxy-Authorization", "Te", "Trailer", "Transfer-Encoding", "Upgrade", "Http2-Settings"}

// prepareRequest removes what belongs to the client's connection and returns the protocol that the client asks to switch to, if any.
// It may be called again for the same exchange. h2c by Upgrade is never passed on: RFC 9113 gave it up, and behind a proxy it smuggles.
func prepareRequest(x *hop.Exchange) (upgrade string) {
	h := &x.Req.Header
	if h.ConnectionUpgrade() {
		if p := h.Peek("Upgrade"); len(p) > 0 && !bytes.EqualFold(p, []byte("h2c")) {
			upgrade = string(p)
		}
	}
	trailers := acceptsTrailers(h.Peek("Te"))
	dropNamed(h.PeekAll("Connection"), h.Del)
	for _, k := range hopByHop {
		h.Del(k)
	}
	h.ResetConnectionClose()
	h.SetNoDefaultContentType(true)
	h.SetProtocol("HTTP/1.1")
	if trailers {
		h.Set("Te", "trailers")
	}
	if upgrade != "" {
		h.Set("Upgrade", upgrade)
	}
	return upgrade
}

func acceptsTrailers(te []byte) bool {
	for v := range bytes.SplitSeq(te, []byte(",")) {
		if bytes.EqualFold(trimmed(v), []byte("trailers")) {
			return true
		}
	}
	return false
}

// dropNamed removes the fields that Connection names. Those that frame the message are not for the sender to remove.
func dropNamed(connection [][]byte, del func(string)) {
	for _, line := range connection {
		if bytes.IndexByte(line, ',') < 0 && (bytes.EqualFold(line, []byte("close")) || bytes.EqualFold(line, []byte("keep-alive")) || bytes.EqualFold(line, []byte("upgrade"))) {
			continue
		}
		for v := range bytes.SplitSeq(line, []byte(",")) {
			v = trimmed(v)
			if len(v) == 0 || bytes.EqualFold(v, []byte("close")) || bytes.EqualFold(v, []byte("host")) || bytes.EqualFold(v, []byte("content-length")) || bytes.EqualFold(v, []byte("content-type")) {
				continue
			}
			del(string(v))
		}
	}
}

// cleanResponse removes what belongs to the instance's connection.
func cleanResponse(h *fasthttp.ResponseHeader) {
	dropNamed(h.PeekAll("Connection"), h.Del)
	for _, k := range hopByHop {
		h.Del(k)
	}
	h.ResetConnectionClose()
}

// appendHead writes the head of the request. An upgrade's Connection field is added here because the header type keeps
// Connection to itself.
func appendHead(dst []byte, h *fasthttp.RequestHeader, upgrading bool) []byte {
	if upgrading {
		h.Set("Connection", "Upgrade")
	}
	return h.AppendBytes(dst)
}
