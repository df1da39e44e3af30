// Package client speaks to Thaw's API: the Knative Serving REST API with the few endpoints that Thaw adds (logs, packages,
// scale). It is what the verbs of cmd/thaw stand on, and is small on purpose: one method per request, typed objects in and
// out, Kubernetes' Status as a typed error. It caches nothing and retries nothing, except where a doc comment says so.
package client

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
)

// DefaultServer is where the verbs look for the API when nothing else is said.
const DefaultServer = "http://127.0.0.1:8081"

// maxAnswer bounds an answer that is read as a whole, in bytes. 10,000 services are about 20 MiB.
const maxAnswer = 256 << 20

// Config says where the API is and who asks.
type Config struct {
	Server  string        // http://HOST:PORT or https://HOST:PORT; "" = DefaultServer
	Token   string        // sent as a bearer token; "" = none
	CAFile  string        // PEM file with the authorities to trust for https; "" = the system's
	Agent   string        // User-Agent and field manager; "" = "thaw"
	Timeout time.Duration // of one request that is not a stream; 0 = 30 s

	// Warn is called for each Warning header of an answer. nil = warnings are dropped.
	Warn func(text string)
	// Transport replaces the default one, for tests. CAFile has no effect then.
	Transport http.RoundTripper
}

// Discover fills in a Config the way all verbs do: server from the flag, else THAW_API, else DefaultServer; the token from
// THAW_TOKEN, else from the file "token" in the data directory, which is the flag's, else THAW_DATA's, else ~/.thaw. A
// missing token file is no error (a server may ask for none); one that cannot be read is.
func Discover(server, data string, getenv func(string) string) (Config, error) {
	c := Config{Server: firstOf(server, getenv("THAW_API"), DefaultServer), Token: getenv("THAW_TOKEN")}
	if c.Token != "" {
		return c, nil
	}
	dir, err := DataDir(data, getenv)
	if err != nil {
		return c, err
	}
	b, err := os.ReadFile(filepath.Join(dir, "token"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return c, fmt.Errorf("read the API token: %w", err)
	}
	c.Token = strings.TrimSpace(string(b))
	return c, nil
}

// DataDir is the data directory that the verbs look into: the flag's value, else THAW_DATA, else ~/.thaw.
func DataDir(data string, getenv func(string) string) (string, error) {
	if dir := firstOf(data, getenv("THAW_DATA")); dir != "" {
		return dir, nil
	}
	if home := getenv("HOME"); home != "" {
		return filepath.Join(home, ".thaw"), nil
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return "", fmt.Errorf("find the data directory: %w", err)
	}
	return filepath.Join(home, ".thaw"), nil
}

func firstOf(list ...string) string {
	for _, s := range list {
		if s != "" {
			return s
		}
	}
	return ""
}

// Client talks to one server. It may be used by many goroutines.
type Client struct {
	base    *url.URL
	token   string
	agent   string
	timeout time.Duration
	warn    func(string)
	http    *http.Client
}

// New makes a client; it does not connect yet.
func New(c Config) (*Client, error) {
	server := firstOf(c.Server, DefaultServer)
	if !strings.Contains(server, "://") {
		server = "http://" + server
	}
	base, err := url.Parse(server)
	if err != nil {
		return nil, fmt.Errorf("address of the API: %w", err)
	}
	if (base.Scheme != "http" && base.Scheme != "https") || base.Host == "" {
		return nil, fmt.Errorf("address of the API: %q is not of the form http://HOST:PORT", server)
	}
	base.Path, base.RawQuery, base.Fragment = strings.TrimSuffix(base.Path, "/"), "", ""
	token := c.Token
	if base.User != nil { // http://thaw:TOKEN@HOST:PORT, as in a kubeconfig
		if p, ok := base.User.Password(); ok && token == "" {
			token = p
		}
		base.User = nil
	}
	transport := c.Transport
	if transport == nil {
		t := http.DefaultTransport.(*http.Transport).Clone()
		if c.CAFile != "" {
			pem, err := os.ReadFile(c.CAFile)
			if err != nil {
				return nil, fmt.Errorf("read the API's certificate authority: %w", err)
			}
			pool := x509.NewCertPool()
			if !pool.AppendCertsFromPEM(pem) {
				return nil, fmt.Errorf("%s holds no certificate in PEM form", c.CAFile)
			}
			t.TLSClientConfig = &tls.Config{RootCAs: pool}
		}
		transport = t
	}
	client := &Client{
		base: base, token: token, agent: firstOf(c.Agent, "thaw"), timeout: c.Timeout, warn: c.Warn,
		http: &http.Client{Transport: transport},
	}
	if client.timeout == 0 {
		client.timeout = 30 * time.Second
	}
	if client.warn == nil {
		client.warn = func(string) {}
	}
	return client, nil
}

// Server is the address that the client talks to, without credentials.
func (c *Client) Server() string { return c.base.String() }

// Token is what the client identifies itself with; "" = nothing.
func (c *Client) Token() string { return c.token }

// CloseIdle closes connections that are kept for the next request.
func (c *Client) CloseIdle() { c.http.CloseIdleConnections() }

// request is one call of the API.
type request struct {
	method      string
	path        string // absolute, already escaped segment by segment
	query       url.Values
	contentType string
	body        io.Reader
	size        int64 // of body; 0 = let net/http find out
	accept      string
}

// stream sends a request and returns the answer with its body still to be read. Statuses from 400 on become errors.
func (c *Client) stream(ctx context.Context, r request) (*http.Response, error) {
	u := *c.base
	u.RawPath = c.base.EscapedPath() + r.path
	p, err := url.PathUnescape(u.RawPath)
	if err != nil {
		return nil, fmt.Errorf("path %s: %w", u.RawPath, err)
	}
	u.Path, u.RawQuery = p, r.query.Encode()
	req, err := http.NewRequestWithContext(ctx, r.method, u.String(), r.body)
	if err != nil {
		return nil, err
	}
	if r.size > 0 {
		req.ContentLength = r.size
	}
	req.Header.Set("User-Agent", c.agent)
	req.Header.Set("Accept", firstOf(r.accept, "application/json"))
	if r.contentType != "" {
		req.Header.Set("Content-Type", r.contentType)
	}
	if c.token != "" {
		req.Header.Set("Authorization", "Bearer "+c.token)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return nil, c.explain(ctx, err)
	}
	for _, h := range resp.Header.Values("Warning") {
		for _, text := range ParseWarnings(h) {
			c.warn(text)
		}
	}
	if resp.StatusCode >= 400 {
		defer resp.Body.Close()
		body, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
		return nil, statusError(r.method, r.path, resp, body)
	}
	return resp, nil
}

// do sends a request and reads the whole answer, within the client's time-out.
func (c *Client) do(ctx context.Context, r request) (status int, body []byte, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, noAnswer{c.timeout})
	defer cancel()
	resp, err := c.stream(ctx, r)
	if err != nil {
		return 0, nil, err
	}
	defer resp.Body.Close()
	body, err = io.ReadAll(io.LimitReader(resp.Body, maxAnswer+1))
	if err != nil {
		return 0, nil, c.explain(ctx, err)
	}
	if len(body) > maxAnswer {
		return 0, nil, fmt.Errorf("answer to %s %s is larger than %d bytes", r.method, r.path, maxAnswer)
	}
	return resp.StatusCode, body, nil
}

// noAnswer is the cause when the client's own time-out ended a request.
type noAnswer struct{ after time.Duration }

func (e noAnswer) Error() string { return fmt.Sprintf("no answer within %s", e.after) }

// explain turns a failure of the transport into an UnreachableError, except when the caller has given up.
func (c *Client) explain(ctx context.Context, err error) error {
	if ctx.Err() != nil {
		if cause := context.Cause(ctx); errors.As(cause, new(noAnswer)) {
			return &UnreachableError{Server: c.Server(), Err: cause}
		}
		return ctx.Err()
	}
	var ue *url.Error
	if errors.As(err, &ue) { // its text repeats method and URL, which the caller knows better
		err = ue.Err
	}
	return &UnreachableError{Server: c.Server(), Err: err}
}

// Raw sends any request and returns the whole answer's body: for what has no method here. path is absolute.
func (c *Client) Raw(ctx context.Context, method, path, contentType string, body []byte) ([]byte, error) {
	_, answer, err := c.do(ctx, request{method: method, path: path, contentType: contentType, body: bytes.NewReader(body)})
	return answer, err
}

// ParseWarnings returns the texts of a Warning header (RFC 7234, 5.5): code, agent and a quoted text, more of them after
// commas. What is not of that form ends the list; what was read before it counts.
func ParseWarnings(header string) []string {
	var texts []string
	for rest := strings.TrimSpace(header); rest != ""; {
		_, after, ok := strings.Cut(rest, " ") // code
		if !ok {
			break
		}
		_, after, ok = strings.Cut(strings.TrimLeft(after, " "), " ") // agent
		after = strings.TrimLeft(after, " ")
		if !ok || !strings.HasPrefix(after, `"`) {
			break
		}
		text, after, ok := unquote(after)
		if !ok {
			break
		}
		texts = append(texts, text)
		after = strings.TrimLeft(after, " ")
		if strings.HasPrefix(after, `"`) { // the optional date
			if _, after, ok = unquote(after); !ok {
				break
			}
		}
		if rest, ok = strings.CutPrefix(strings.TrimLeft(after, " "), ","); !ok {
			break
		}
		rest = strings.TrimSpace(rest)
	}
	return texts
}

// unquote reads a quoted-string at the beginning of s and returns its text and what follows it.
func unquote(s string) (text, rest string, ok bool) {
	var b strings.Builder
	for i := 1; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
			if i == len(s) {
				return "", "", false
			}
			b.WriteByte(s[i])
		case '"':
			return b.String(), s[i+1:], true
		default:
			b.WriteByte(s[i])
		}
	}
	return "", "", false
}

// collection is the path of a kind's objects; ns "" = of all namespaces.
func collection(k *api.Kind, ns string) string {
	if ns == "" {
		return "/apis/" + k.APIVersion + "/" + k.Plural
	}
	return "/apis/" + k.APIVersion + "/namespaces/" + url.PathEscape(ns) + "/" + k.Plural
}

func item(k *api.Kind, ns, name string) string { return collection(k, ns) + "/" + url.PathEscape(name) }

func decode(k *api.Kind, body []byte) (api.Object, error) {
	o := k.New()
	if err := json.Unmarshal(body, o); err != nil {
		return nil, fmt.Errorf("read the server's %s: %w", k.Singular, err)
	}
	return o, nil
}
