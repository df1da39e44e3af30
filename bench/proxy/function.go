package main

import (
	"bytes"
	"context"
	"fmt"
	"log"
	"net"
	"strings"
	"sync"

	"github.com/valyala/fasthttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// function answers in this process, without work: 13 bytes, or 64 KiB on /64k. /gate answers once the gate is open.
type function struct {
	h1, h2 string // addresses

	mu   sync.Mutex
	gate chan struct{} // closed = open
}

const large = 64 << 10

func newFunction() *function {
	f := &function{gate: make(chan struct{})}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	f.h1 = ln.Addr().String()
	small, big := []byte("Hello, world!"), bytes.Repeat([]byte("x"), large)
	s := &fasthttp.Server{NoDefaultDate: true, Handler: func(c *fasthttp.RequestCtx) {
		switch string(c.Path()) {
		case "/64k":
			c.SetBody(big)
		case "/gate":
			f.mu.Lock()
			gate := f.gate
			f.mu.Unlock()
			<-gate
			c.SetBody(small)
		default:
			c.SetBody(small)
		}
	}}
	go func() { log.Fatal(s.Serve(ln)) }()

	ln2, err := net.Listen("tcp", "127.0.0.1:0")
	check(err)
	f.h2 = ln2.Addr().String()
	g := grpc.NewServer(grpc.MaxConcurrentStreams(1000))
	grpc_health_v1.RegisterHealthServer(g, healthy{})
	go func() { log.Fatal(g.Serve(ln2)) }()
	return f
}

// shut closes the gate; what it returns opens it.
func (f *function) shut() (open func()) {
	gate := make(chan struct{})
	f.mu.Lock()
	f.gate = gate
	f.mu.Unlock()
	return func() { close(gate) }
}

// healthy answers gRPC's health check, the one unary call that every installation has.
type healthy struct {
	grpc_health_v1.UnimplementedHealthServer
}

// Check says that all is well.
func (healthy) Check(context.Context, *grpc_health_v1.HealthCheckRequest) (*grpc_health_v1.HealthCheckResponse, error) {
	return &grpc_health_v1.HealthCheckResponse{Status: grpc_health_v1.HealthCheckResponse_SERVING}, nil
}

// upload is a request with a body.
func upload(path string, size int) []byte {
	head := fmt.Sprintf("POST %s HTTP/1.1\r\nHost: hello.default.localhost\r\nUser-Agent: bench\r\nContent-Type: application/octet-stream\r\nContent-Length: %d\r\n\r\n", path, size)
	return append([]byte(head), bytes.Repeat([]byte("x"), size)...)
}

func request(path string, close bool) []byte {
	var b strings.Builder
	b.WriteString("GET " + path + " HTTP/1.1\r\nHost: hello.default.localhost\r\nUser-Agent: bench\r\nAccept: */*\r\n")
	if close {
		b.WriteString("Connection: close\r\n")
	}
	return []byte(b.String() + "\r\n")
}
