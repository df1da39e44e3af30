package accesslog

import (
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Entry is a request that is over. Empty means not known.
type Entry struct {
	Time      time.Time // of its arrival
	RequestID string
	Method    []byte
	Host      []byte
	Path      []byte // without the query
	Query     []byte
	Protocol  string // HTTP/1.0, HTTP/1.1, HTTP/2
	TLS       bool
	Client    netip.AddrPort
	UserAgent []byte
	Referer   []byte
	Status    int
	Reason    []byte        // of an answer that the platform gave itself: X-Thaw-Error
	Cut       bool          // the answer broke off after its head
	In, Out   int64         // bytes of the bodies
	Duration  time.Duration // to the end of the answer
	Waited    time.Duration // for a free slot
	Cold      bool          // waited for the start of its instance
	Namespace string
	Service   string
	Revision  string
	Instance  string
	Trace     string
}

// field writes one field, or text of a template.
type field struct {
	name  string
	write func(p *printer, e *Entry)
	text  string // instead of write
}

// fields are all there are, in the order in which JSON has them.
var fields = []field{
	{name: "time", write: func(p *printer, e *Entry) { p.time(e.Time) }},
	{name: "request_id", write: func(p *printer, e *Entry) { p.string(e.RequestID) }},
	{name: "client", write: func(p *printer, e *Entry) { p.address(e.Client) }},
	{name: "method", write: func(p *printer, e *Entry) { p.bytes(e.Method) }},
	{name: "host", write: func(p *printer, e *Entry) { p.bytes(e.Host) }},
	{name: "path", write: func(p *printer, e *Entry) { p.bytes(e.Path) }},
	{name: "query", write: func(p *printer, e *Entry) { p.bytes(e.Query) }},
	{name: "protocol", write: func(p *printer, e *Entry) { p.string(e.Protocol) }},
	{name: "tls", write: func(p *printer, e *Entry) { p.truth(e.TLS) }},
	{name: "user_agent", write: func(p *printer, e *Entry) { p.bytes(e.UserAgent) }},
	{name: "referer", write: func(p *printer, e *Entry) { p.bytes(e.Referer) }},
	{name: "status", write: func(p *printer, e *Entry) { p.number(int64(e.Status)) }},
	{name: "reason", write: func(p *printer, e *Entry) { p.bytes(e.Reason) }},
	{name: "cut", write: func(p *printer, e *Entry) { p.truth(e.Cut) }},
	{name: "bytes_in", write: func(p *printer, e *Entry) { p.number(e.In) }},
	{name: "bytes_out", write: func(p *printer, e *Entry) { p.number(e.Out) }},
	{name: "duration", write: func(p *printer, e *Entry) { p.seconds(e.Duration) }},
	{name: "queue_wait", write: func(p *printer, e *Entry) { p.seconds(e.Waited) }},
	{name: "cold", write: func(p *printer, e *Entry) { p.truth(e.Cold) }},
	{name: "namespace", write: func(p *printer, e *Entry) { p.string(e.Namespace) }},
	{name: "service", write: func(p *printer, e *Entry) { p.string(e.Service) }},
	{name: "revision", write: func(p *printer, e *Entry) { p.string(e.Revision) }},
	{name: "instance", write: func(p *printer, e *Entry) { p.string(e.Instance) }},
	{name: "trace_id", write: func(p *printer, e *Entry) { p.string(e.Trace) }},
}

// notInJSON are fields that only a template gets: they may hold what should not be kept, passwords in queries for example.
var notInJSON = map[string]bool{"query": true, "referer": true}

// parse reads a format; nil is JSON.
func parse(format string) ([]field, error) {
	if format == "" || format == "json" {
		return nil, nil
	}
	var out []field
	known := func(name string) bool {
		for _, f := range fields {
			if f.name == name {
				out = append(out, f)
				return true
			}
		}
		return false
	}
	text := func(s string) {
		if s != "" {
			out = append(out, field{text: s})
		}
	}
	if strings.ContainsAny(format, "\r\n") {
		return nil, fmt.Errorf("access log format: a template is one line; it has a line break at byte %d", strings.IndexAny(format, "\r\n"))
	}
	for rest := format; rest != ""; {
		at := len(format) - len(rest)
		i := strings.IndexAny(rest, "{}")
		if i < 0 {
			text(rest)
			break
		}
		text(rest[:i])
		if rest[i:min(i+2, len(rest))] == rest[i:i+1]+rest[i:i+1] { // {{ and }} are the braces themselves
			text(rest[i : i+1])
			rest = rest[i+2:]
			continue
		}
		end := strings.IndexByte(rest[i:], '}')
		if rest[i] == '}' || end < 0 {
			return nil, fmt.Errorf("access log format: brace at byte %d has no partner; write {{ or }} for a brace itself", at+i)
		}
		name := rest[i+1 : i+end]
		if !known(name) {
			return nil, fmt.Errorf("access log format: no field %q at byte %d; there are %s, and the format json", name, at+i, names())
		}
		rest = rest[i+end+1:]
	}
	if len(out) == 1 && out[0].text != "" {
		return nil, fmt.Errorf("access log format %q names no field in braces; want json or a template such as {time} {method} {path} {status}", format)
	}
	return out, nil
}

func names() string {
	var b strings.Builder
	for i, f := range fields {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(f.name)
	}
	return b.String()
}

// printer puts a line together; it is used again.
type printer struct {
	b     []byte
	small []byte // a string's bytes
	json  bool
}

const (
	maxText = 2 << 10 // bytes of one field; the rest is cut off
	maxKept = 64 << 10
)

// line makes p.b a line with its end.
func (p *printer) line(format []field, e *Entry) {
	if cap(p.b) > maxKept {
		p.b = nil
	}
	p.b, p.json = p.b[:0], format == nil
	if p.json {
		for i := range fields {
			if notInJSON[fields[i].name] {
				continue
			}
			p.b = append(p.b, `,"`...)
			p.b = append(append(p.b, fields[i].name...), `":`...)
			fields[i].write(p, e)
		}
		p.b[0] = '{'
		p.b = append(p.b, "}\n"...)
		return
	}
	for i := range format {
		if format[i].write == nil {
			p.b = append(p.b, format[i].text...)
			continue
		}
		format[i].write(p, e)
	}
	p.b = append(p.b, '\n')
}

func (p *printer) number(n int64) { p.b = strconv.AppendInt(p.b, n, 10) }

func (p *printer) truth(v bool) { p.b = strconv.AppendBool(p.b, v) }

// seconds writes microseconds as 0.000001.
func (p *printer) seconds(d time.Duration) {
	us := max(d.Microseconds(), 0)
	p.b = append(strconv.AppendInt(p.b, us/1e6, 10), '.')
	us %= 1e6
	for unit := int64(1e5); unit > 0; unit /= 10 {
		p.b = append(p.b, byte('0'+us/unit%10))
	}
}

func (p *printer) time(t time.Time) {
	p.quote()
	p.b = t.UTC().AppendFormat(p.b, "2006-01-02T15:04:05.000000Z")
	p.quote()
}

func (p *printer) address(a netip.AddrPort) {
	if !a.IsValid() {
		p.bytes(nil)
		return
	}
	p.quote()
	p.b = a.AppendTo(p.b)
	p.quote()
}

func (p *printer) quote() {
	if p.json {
		p.b = append(p.b, '"')
	}
}

func (p *printer) string(s string) {
	p.small = append(p.small[:0], s...)
	p.bytes(p.small)
}

// bytes writes what may be anything. What is no printable character is written as JSON's \u… or a template's \x…, so that it stays on its
// line and means nothing to a terminal; in a template nothing is "-".
func (p *printer) bytes(s []byte) {
	if !p.json && len(s) == 0 {
		p.b = append(p.b, '-')
		return
	}
	cut := len(s) > maxText
	if cut {
		s = s[:maxText]
	}
	p.quote()
	for {
		i := 0
		for i < len(s) && plain[s[i]] {
			i++
		}
		p.b = append(p.b, s[:i]...)
		if s = s[i:]; len(s) == 0 {
			break
		}
		r, n := utf8.DecodeRune(s)
		switch {
		case r == '"' || r == '\\':
			p.b = append(p.b, '\\', s[0])
		case r == utf8.RuneError && n == 1 || !strconv.IsPrint(r):
			p.escape(r, s[:n])
		default:
			p.b = append(p.b, s[:n]...)
		}
		s = s[n:]
	}
	if cut {
		p.b = append(p.b, "..."...)
	}
	p.quote()
}

// plain are the bytes that stand for themselves.
var plain = func() (t [256]bool) {
	for c := byte(' '); c < 0x7f; c++ {
		t[c] = c != '"' && c != '\\'
	}
	return t
}()

const hexDigits = "0123456789abcdef"

// escape writes r, which was read from raw.
func (p *printer) escape(r rune, raw []byte) {
	if !p.json {
		for _, c := range raw {
			p.b = append(p.b, '\\', 'x', hexDigits[c>>4], hexDigits[c&15])
		}
		return
	}
	if r >= 0x10000 { // as a surrogate pair
		r -= 0x10000
		p.unicode(0xd800 + r>>10)
		r = 0xdc00 + r&0x3ff
	}
	p.unicode(r)
}

func (p *printer) unicode(r rune) {
	p.b = append(p.b, '\\', 'u', hexDigits[r>>12&15], hexDigits[r>>8&15], hexDigits[r>>4&15], hexDigits[r&15])
}
