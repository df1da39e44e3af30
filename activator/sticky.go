package activator

import (
	"math/rand/v2"
	"strconv"

	"github.com/valyala/fasthttp"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/breaker"
	"github.com/thawrun/thaw/internal/hop"
)

// cookieName is the cookie that requests of one client stick by. Its value is drawn and says nothing about instances: which one it leads to is
// computed from it and from the instances that there are.
const cookieName = "thaw-sticky"

// keyOf returns what x sticks by, 0 = nothing. A client that is to be given a cookie gets a fresh value.
func keyOf(s api.Sticky, x *hop.Exchange) (key uint64, fresh string) {
	if !s.Cookie {
		if v := x.Req.Header.Peek(s.Header); len(v) > 0 {
			return breaker.KeyOf(v), ""
		}
		return 0, ""
	}
	if v := x.Req.Header.Cookie(cookieName); ours(v) {
		return breaker.KeyOf(v), ""
	}
	fresh = strconv.FormatUint(rand.Uint64()|1<<63, 16)
	return breaker.KeyOf([]byte(fresh)), fresh
}

// ours says whether v is a value as we make them. Anything else is replaced.
func ours(v []byte) bool {
	if len(v) != 16 {
		return false
	}
	for _, c := range v {
		if !('0' <= c && c <= '9' || 'a' <= c && c <= 'f') {
			return false
		}
	}
	return true
}

// setCookie gives the client its value, until it closes the browser.
func setCookie(x *hop.Exchange, value string) {
	var c fasthttp.Cookie
	c.SetKey(cookieName)
	c.SetValue(value)
	c.SetPath("/")
	c.SetHTTPOnly(true)
	c.SetSameSite(fasthttp.CookieSameSiteLaxMode)
	c.SetSecure(x.TLS)
	x.Resp.Header.Add("Set-Cookie", c.String())
}
