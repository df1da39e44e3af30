package probe

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"time"
)

// UserAgent is what HTTP probes call themselves unless their headers say otherwise. The prefix is kubelet's, which functions and their
// frameworks know to keep out of logs and counts.
const UserAgent = "kube-probe/thaw"

// maxHead bounds the head of a probe's answer in bytes.
const maxHead = 64 << 10

// connect dials addr. A failure means that the function has not seen the try.
func (p *Prober) connect(ctx context.Context) (net.Conn, error) {
	c, err := p.o.Dial(ctx, "tcp", p.addr)
	if err != nil {
		return nil, fmt.Errorf("%w at %s: %w", ErrUnreachable, p.addr, err)
	}
	return c, nil
}

// bind lets ctx end what is going on on c. A deadline of the connection's own would often be a little ahead of ctx, and the failure would
// not say whose time was over. The returned func must be called before c is used otherwise.
func bind(ctx context.Context, c net.Conn) (release func()) {
	stop := context.AfterFunc(ctx, func() { c.SetDeadline(time.Unix(1, 0)) })
	return func() { stop() }
}

func (p *Prober) tryTCP(ctx context.Context) error {
	c, err := p.connect(ctx)
	if err != nil {
		return err
	}
	return c.Close()
}

// httpRequest builds the request of an HTTP probe.
func (p *Prober) httpRequest() (*http.Request, error) {
	a := p.probe.HTTPGet
	path := a.Path
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	u, err := url.ParseRequestURI(path)
	if err != nil {
		return nil, fmt.Errorf("probe: httpGet.path: %w", err)
	}
	if u.Scheme = strings.ToLower(a.Scheme); u.Scheme == "" {
		u.Scheme = "http"
	}
	u.Host = p.addr
	r := &http.Request{Method: http.MethodGet, URL: u, Host: a.Host, Header: http.Header{}, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1, Close: true}
	for _, h := range a.HTTPHeaders {
		if strings.EqualFold(h.Name, "Host") {
			r.Host = h.Value
			continue
		}
		r.Header.Add(h.Name, h.Value)
	}
	if r.Host == "" {
		r.Host = p.addr
	}
	if _, ok := r.Header["User-Agent"]; !ok {
		r.Header.Set("User-Agent", UserAgent)
	}
	if _, ok := r.Header["Accept"]; !ok {
		r.Header.Set("Accept", "*/*")
	}
	return r, nil
}

// checkHTTP refuses an HTTP probe that could never be sent.
func (p *Prober) checkHTTP() error {
	if p.probe.HTTPGet == nil {
		return nil
	}
	if s := strings.ToUpper(p.probe.HTTPGet.Scheme); s != "" && s != "HTTP" && s != "HTTPS" {
		return fmt.Errorf("probe: httpGet.scheme %q, expected HTTP or HTTPS", p.probe.HTTPGet.Scheme)
	}
	r, err := p.httpRequest()
	if err != nil {
		return err
	}
	if strings.ContainsFunc(r.Host, func(c rune) bool { return c <= ' ' || c == 0x7f || c == '/' }) {
		return fmt.Errorf("probe: httpGet: %q cannot be a Host header", r.Host)
	}
	if err := r.Write(io.Discard); err != nil {
		return fmt.Errorf("probe: httpGet: %w", err)
	}
	return nil
}

// tryHTTP speaks HTTP/1.1 over its own connection: 200..399 is a success, redirects are not followed. It does without http.Client, whose
// two goroutines and pool per try would cost more than the rest of an aggressive probe.
func (p *Prober) tryHTTP(ctx context.Context) error {
	c, err := p.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	defer bind(ctx, c)()
	req, err := p.httpRequest()
	if err != nil {
		return err
	}
	if req.URL.Scheme == "https" {
		// As kubelet: the certificate says nothing about being well, and nothing secret is sent.
		c = tls.Client(c, &tls.Config{InsecureSkipVerify: true, ServerName: hostOnly(req.Host)})
	}
	if err := req.Write(c); err != nil {
		return fmt.Errorf("HTTP probe: %w", err)
	}
	in := bufio.NewReader(io.LimitReader(c, maxHead))
	var res *http.Response
	for {
		if res, err = http.ReadResponse(in, req); err != nil {
			return fmt.Errorf("HTTP probe: %w", noEOF(err))
		}
		if res.StatusCode >= 200 || res.StatusCode == http.StatusSwitchingProtocols {
			break
		}
	}
	if res.StatusCode >= 200 && res.StatusCode <= 399 {
		return nil
	}
	body, _ := io.ReadAll(io.LimitReader(res.Body, int64(p.o.MaxOutput))) // a part of the reason is better than none
	return fmt.Errorf("HTTP probe: GET %s answered %s%s", req.URL.RequestURI(), res.Status, quote(body))
}

// noEOF says in words that the connection was closed before the answer.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return errors.New("the connection was closed before a whole answer came")
	}
	return err
}

// quote is the last line of what a function said, for the end of an error; nothing stays nothing.
func quote(b []byte) string {
	b = bytes.TrimSpace(b)
	if len(b) == 0 {
		return ""
	}
	return fmt.Sprintf(": %q", b)
}

// hostOnly is host without its port.
func hostOnly(host string) string {
	if h, _, err := net.SplitHostPort(host); err == nil {
		return h
	}
	return host
}
