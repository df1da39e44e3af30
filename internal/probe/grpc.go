package probe

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strconv"
)

// tryGRPC calls grpc.health.v1.Health/Check over HTTP/2 without TLS, as kubelet does; SERVING is a success. The one message each
// way is written by hand: a gRPC library would be ten times the rest of the sidecar.
func (p *Prober) tryGRPC(ctx context.Context) error {
	c, err := p.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	given := false
	tr := &http.Transport{
		DisableCompression: true,
		Protocols:          new(http.Protocols),
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			if given { // the transport would like to try again
				return nil, errors.New("the connection was lost")
			}
			given = true
			return c, nil
		},
	}
	tr.Protocols.SetUnencryptedHTTP2(true)
	defer tr.CloseIdleConnections()

	req := (&http.Request{
		Method: http.MethodPost,
		URL:    &url.URL{Scheme: "http", Host: p.addr, Path: "/grpc.health.v1.Health/Check"},
		Host:   p.addr,
		Header: http.Header{"Content-Type": {"application/grpc"}, "Te": {"trailers"}, "User-Agent": {UserAgent}},
	}).WithContext(ctx)
	msg := healthRequest(p.probe.GRPC.Service)
	req.ContentLength = int64(len(msg))
	body := &oneRead{b: msg}
	req.Body = body
	res, err := tr.RoundTrip(req)
	if err != nil {
		return fmt.Errorf("gRPC probe: %w", noEOF(err))
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("gRPC probe: answered HTTP %s", res.Status)
	}
	answer, err := io.ReadAll(io.LimitReader(res.Body, 4096))
	if err != nil {
		return fmt.Errorf("gRPC probe: %w", noEOF(err))
	}
	if err := grpcStatus(res); err != nil {
		return err
	}
	status, err := healthStatus(answer)
	if err != nil {
		return fmt.Errorf("gRPC probe: %w", err)
	}
	if status != serving {
		return fmt.Errorf("gRPC probe: service %q is %s", p.probe.GRPC.Service, statusName(status))
	}
	return nil
}

// oneRead is a request body that cannot be read twice.
type oneRead struct{ b []byte }

func (r *oneRead) Read(p []byte) (int, error) {
	n := copy(p, r.b)
	if r.b = r.b[n:]; len(r.b) == 0 {
		return n, io.EOF
	}
	return n, nil
}

func (r *oneRead) Close() error { return nil }

// grpcStatus reads the outcome of a call: in the trailer, or in the header when there was no message.
func grpcStatus(res *http.Response) error {
	code, text := res.Trailer.Get("Grpc-Status"), res.Trailer.Get("Grpc-Message")
	if code == "" {
		code, text = res.Header.Get("Grpc-Status"), res.Header.Get("Grpc-Message")
	}
	switch code {
	case "0":
		return nil
	case "":
		return errors.New("gRPC probe: the answer has no grpc-status")
	case "5":
		return fmt.Errorf("gRPC probe: unknown service (%s)", text)
	case "12":
		return errors.New("gRPC probe: the function does not implement grpc.health.v1.Health")
	}
	return fmt.Errorf("gRPC probe: grpc-status %s (%s)", code, text)
}

// serving is HealthCheckResponse.ServingStatus SERVING.
const serving = 1

func statusName(s uint64) string {
	names := [...]string{"UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN"}
	if s < uint64(len(names)) {
		return names[s]
	}
	return "in state " + strconv.FormatUint(s, 10)
}

// healthRequest is HealthCheckRequest{service = 1} as a length-prefixed message.
func healthRequest(service string) []byte {
	var m []byte
	if service != "" {
		m = append(m, 1<<3|2)
		m = binary.AppendUvarint(m, uint64(len(service)))
		m = append(m, service...)
	}
	return append(binary.BigEndian.AppendUint32([]byte{0}, uint32(len(m))), m...)
}

// healthStatus reads field 1 of a length-prefixed HealthCheckResponse; a missing field is 0, UNKNOWN, and of several the last counts.
func healthStatus(b []byte) (uint64, error) {
	if len(b) < 5 {
		return 0, fmt.Errorf("the message is cut off after %d bytes", len(b))
	}
	if b[0] != 0 {
		return 0, errors.New("the message is compressed, which was not asked for")
	}
	n := binary.BigEndian.Uint32(b[1:5])
	if b = b[5:]; uint64(len(b)) < uint64(n) {
		return 0, fmt.Errorf("the message has %d bytes of %d", len(b), n)
	}
	b = b[:n]
	var status uint64
	for len(b) > 0 {
		tag, k := binary.Uvarint(b)
		if k <= 0 {
			return 0, errors.New("the message is not valid: tag")
		}
		b = b[k:]
		var skip uint64
		switch tag & 7 {
		case 0:
			v, k := binary.Uvarint(b)
			if k <= 0 {
				return 0, errors.New("the message is not valid: number")
			}
			if tag>>3 == 1 {
				status = v
			}
			skip = uint64(k)
		case 1:
			skip = 8
		case 2:
			l, k := binary.Uvarint(b)
			if k <= 0 {
				return 0, errors.New("the message is not valid: length")
			}
			b, skip = b[k:], l
		case 5:
			skip = 4
		default:
			return 0, fmt.Errorf("the message is not valid: wire type %d", tag&7)
		}
		if skip > uint64(len(b)) {
			return 0, errors.New("the message is not valid: it ends inside a field")
		}
		b = b[skip:]
	}
	return status, nil
}
