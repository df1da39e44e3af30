package forward

import (
	"strconv"
	"strings"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/internal/hop"
)

// appendFields writes x's request line and the fields that are to be passed on, in their order, without the empty line at the end. x is
// not changed by it, so that the request may go to another instance.
func appendFields(dst []byte, x *hop.Exchange) ([]byte, hop.Connection) {
	h := &x.Req.Header
	h.SetNoDefaultContentType(true)
	h.SetProtocol("HTTP/1.1")
	return hop.Filter(h.AppendBytes(dst))
}

// appendHead writes the head of x's request for HTTP/1.1. asked is the protocol that the client wants to switch to, if any: h2c by Upgrade
// is never passed on, since RFC 9113 gave it up, and behind a proxy it smuggles.
func appendHead(dst []byte, x *hop.Exchange, addr string) (head []byte, asked string) {
	dst, conn := appendFields(dst, x)
	if conn.Trailers {
		dst = append(dst, "Te: trailers\r\n"...)
	}
	if asked = withoutH2C(conn.Upgrade); asked != "" {
		dst = append(append(append(dst, "Connection: Upgrade\r\nUpgrade: "...), asked...), "\r\n"...)
	}
	h := &x.Req.Header
	if len(h.Host()) == 0 { // HTTP/1.0 may leave it out, what we send may not
		dst = append(append(append(dst, "Host: "...), addr...), "\r\n"...)
	}
	switch {
	case x.BodySize < 0:
		dst = append(dst, "Transfer-Encoding: chunked\r\n"...)
		if conn.Announced != "" {
			dst = append(append(append(dst, "Trailer: "...), conn.Announced...), "\r\n"...)
		}
	case x.BodySize > 0 || h.IsPost() || h.IsPut() || h.IsPatch():
		dst = append(strconv.AppendInt(append(dst, "Content-Length: "...), x.BodySize, 10), "\r\n"...)
	}
	return append(dst, "\r\n"...), asked
}

// withoutH2C takes h2c out of the list of protocols in an Upgrade field.
func withoutH2C(list string) string {
	found := false
	for p := range strings.SplitSeq(list, ",") {
		found = found || strings.EqualFold(strings.TrimSpace(p), "h2c")
	}
	if !found {
		return list
	}
	var kept []string
	for p := range strings.SplitSeq(list, ",") {
		if p = strings.TrimSpace(p); p != "" && !strings.EqualFold(p, "h2c") {
			kept = append(kept, p)
		}
	}
	return strings.Join(kept, ", ")
}

// resetClose forgets that the instance's connection will close, which is nobody's business after this, but keeps what other Connection
// lines named: the front removes those fields.
func resetClose(h *fasthttp.ResponseHeader) {
	if !h.ConnectionClose() {
		return
	}
	var named []string
	for k, v := range h.All() {
		if string(k) == "Connection" && string(v) != "close" {
			named = append(named, string(v))
		}
	}
	h.ResetConnectionClose()
	for _, v := range named {
		h.Add("Connection", v)
	}
}
