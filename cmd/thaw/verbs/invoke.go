package verbs

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/textproto"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
)

// defaultIngress is where `thaw dev` takes requests; used for hosts under .localhost whose URL names no port.
const defaultIngress = "127.0.0.1:8080"

type invokeFlags struct {
	method, data, path, tag, ingress string
	headers                          []string
	include, verbose                 bool
	timeout                          time.Duration
}

func invokeCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	var v invokeFlags
	cmd := &cobra.Command{
		Use:   "invoke NAME",
		Short: "Send a request to a service",
		Long: `Invoke sends one request through the ingress, as any client would, and prints the body of the answer. Hosts under .localhost
need no name server. With -v it shows where the time of a cold request went. The exit code is 7 when the answer's status
is 400 or above.`,
		Example: "  thaw invoke hello\n  thaw invoke hello -v --path /greet?name=you\n  thaw invoke hello -X POST -d @order.json -H 'Content-Type: application/json'",
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.open(); err != nil {
				return err
			}
			return s.invoke(cmd.Context(), args[0], v)
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	f := cmd.Flags()
	f.StringVarP(&v.method, "method", "X", "", "method (default GET, POST with -d)")
	f.StringVarP(&v.data, "body", "d", "", "body; @FILE = from a file, @- = from standard input")
	f.StringArrayVarP(&v.headers, "header", "H", nil, "header 'Name: value'; may be repeated")
	f.StringVar(&v.path, "path", "/", "path, with a query if there is one")
	f.StringVar(&v.tag, "tag", "", "send it to the target with this tag")
	f.StringVar(&v.ingress, "ingress", "", "HOST:PORT to connect to, whatever the URL says (THAW_INGRESS; default: the URL's, for .localhost without a port "+defaultIngress+")")
	f.BoolVarP(&v.include, "include", "i", false, "print status and headers of the answer too")
	f.BoolVarP(&v.verbose, "verbose", "v", false, "show request id, status and where the time went, on standard error")
	f.DurationVar(&v.timeout, "timeout", 0, "give up after this (0 = never)")
	return cmd
}

// targetURL is the address of the service, or of one of its tags.
func targetURL(svc *api.Service, tag string) (string, error) {
	if tag == "" {
		if svc.Status.URL == "" {
			c := svc.Status.Conditions.Get(api.ConditionReady)
			if c == nil {
				return "", fmt.Errorf("service %q has no URL yet", svc.Name)
			}
			return "", fmt.Errorf("service %q has no URL yet: %s: %s", svc.Name, c.Reason, c.Message)
		}
		return svc.Status.URL, nil
	}
	i := slices.IndexFunc(svc.Status.Traffic, func(t api.TrafficTarget) bool { return t.Tag == tag })
	if i < 0 || svc.Status.Traffic[i].URL == "" {
		return "", fmt.Errorf("service %q has no target with the tag %q; the split is %s", svc.Name, tag, trafficText(svc.Status.Traffic))
	}
	return svc.Status.Traffic[i].URL, nil
}

// dialAddress says where to connect to for a URL. Names under .localhost are this machine by definition (RFC 6761), but not
// every system resolves them.
func dialAddress(u *url.URL, ingress string) string {
	if ingress != "" {
		return ingress
	}
	host, port := u.Hostname(), u.Port()
	local := host == "localhost" || strings.HasSuffix(host, ".localhost")
	switch {
	case local && port == "" && u.Scheme == "http":
		return defaultIngress
	case port == "" && u.Scheme == "https":
		port = "443"
	case port == "":
		port = "80"
	}
	if local {
		host = "127.0.0.1"
	}
	return net.JoinHostPort(host, port)
}

func (v *invokeFlags) request(ctx context.Context, s *session, base string) (*http.Request, error) {
	path := v.path
	if !strings.HasPrefix(path, "/") {
		path = "/" + path
	}
	var body io.Reader
	method := v.method
	if v.data != "" {
		body = strings.NewReader(v.data)
		switch file := strings.TrimPrefix(v.data, "@"); {
		case v.data == "@-":
			body = s.Stdin
		case file != v.data:
			f, err := os.Open(file)
			if err != nil {
				return nil, err
			}
			body = f // closed by the transport
		}
		if method == "" {
			method = http.MethodPost
		}
	}
	if method == "" {
		method = http.MethodGet
	}
	req, err := http.NewRequestWithContext(ctx, method, strings.TrimSuffix(base, "/")+path, body)
	if err != nil {
		return nil, usage("%v", err)
	}
	if f, ok := body.(*os.File); ok {
		if st, err := f.Stat(); err == nil && st.Mode().IsRegular() {
			req.ContentLength = st.Size()
		}
	}
	req.Header.Set("User-Agent", "thaw/"+s.Version)
	for _, h := range v.headers {
		name, value, ok := strings.Cut(h, ":")
		if !ok || strings.TrimSpace(name) == "" {
			return nil, usage("--header %q is not of the form 'Name: value'", h)
		}
		name, value = textproto.TrimString(name), textproto.TrimString(value)
		if strings.EqualFold(name, "Host") {
			req.Host = value
			continue
		}
		req.Header.Add(name, value)
	}
	return req, nil
}

func (s *session) invoke(ctx context.Context, name string, v invokeFlags) error {
	svc, err := s.service(ctx, name)
	if err != nil {
		return err
	}
	base, err := targetURL(svc, v.tag)
	if err != nil {
		return fail(err, "thaw describe %s%s", name, s.nsFlag())
	}
	if v.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, v.timeout)
		defer cancel()
	}
	var firstByte time.Time
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{GotFirstResponseByte: func() { firstByte = time.Now() }})
	req, err := v.request(ctx, s, base)
	if err != nil {
		return err
	}
	ingress := v.ingress
	if ingress == "" {
		ingress = s.Getenv("THAW_INGRESS")
	}
	addr := dialAddress(req.URL, ingress)
	var dialer net.Dialer
	transport := &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, network, addr)
		},
		TLSClientConfig:    &tls.Config{ServerName: req.URL.Hostname()},
		DisableCompression: true, // what the function sends is what is printed
	}
	defer transport.CloseIdleConnections()
	start := time.Now()
	resp, err := transport.RoundTrip(req) // no redirects: the answer to this request is asked for
	if err != nil {
		if errors.Is(err, context.DeadlineExceeded) {
			return fmt.Errorf("no answer of %s within %s", name, v.timeout)
		}
		return &Failure{Err: fmt.Errorf("send the request to %s at %s: %w", base, addr, err), Code: ExitUnreachable,
			Next: "look whether the ingress listens there, or name it with --ingress HOST:PORT"}
	}
	defer resp.Body.Close()
	if v.verbose {
		s.explainAnswer(req, resp, firstByte.Sub(start))
	}
	if v.include {
		fmt.Fprintf(s.Stdout, "%s %s\r\n", resp.Proto, resp.Status)
		resp.Header.Write(s.Stdout)
		fmt.Fprint(s.Stdout, "\r\n")
	}
	if _, err := io.Copy(s.Stdout, resp.Body); err != nil {
		return fmt.Errorf("the answer broke off: %w", err)
	}
	if resp.StatusCode < 400 {
		return nil
	}
	f := &Failure{Err: fmt.Errorf("%s answered %s", name, resp.Status), Code: ExitAnswer}
	if reason := resp.Header.Get("X-Thaw-Error"); reason != "" {
		f.Err = fmt.Errorf("the platform answered %s in place of %s: %s", resp.Status, name, cell(reason))
		f.Next = "thaw logs " + name + s.nsFlag()
		if after := resp.Header.Get("Retry-After"); after != "" {
			f.Next += "; or try again in " + cell(after) + " s"
		}
	}
	return f
}

// explainAnswer shows where the time went: the waterfall of a cold request, or the time to the first byte of a warm one.
func (s *session) explainAnswer(req *http.Request, resp *http.Response, took time.Duration) {
	fmt.Fprintf(s.Stderr, "%s %s\n%s", req.Method, req.URL, resp.Status)
	if id := resp.Header.Get("X-Request-Id"); id != "" {
		fmt.Fprintf(s.Stderr, "  request id %s", cell(id))
	}
	fmt.Fprintf(s.Stderr, "  first byte after %.2f ms\n", float64(took.Microseconds())/1000)
	steps := parseServerTiming(strings.Join(resp.Header.Values("Server-Timing"), ","))
	if len(steps) == 0 {
		fmt.Fprintln(s.Stderr, "  warm: no start was needed")
		return
	}
	waterfall(s.Stderr, steps)
}
