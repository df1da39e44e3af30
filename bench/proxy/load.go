package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	vegeta "github.com/tsenart/vegeta/v12/lib"
	"github.com/valyala/fasthttp"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health/grpc_health_v1"
)

// result is one turn of a peer.
type result struct {
	n        int             // requests answered
	took     []time.Duration // of some of them, sorted
	us       float64         // CPU per request
	rate     float64         // requests per second
	kib      float64         // memory per connection or request, of the rows that measure it
	note     string
	p50, p99 time.Duration
}

// row is one kind of load.
type row struct {
	name  string
	title string
	h2    bool
	once  bool // one round: what it leaves in memory would be in the next one
	load  func(b *bench, p *peer, d time.Duration) (result, error)
}

var rows = []row{
	{name: "small", title: "13-byte answers, keep-alive, closed loop", load: closed(request("/path?query=1", false), 13, false)},
	{name: "2k", title: "2,000 requests a second, open loop", load: open(2000)},
	{name: "10k", title: "10,000 requests a second, open loop", load: open(10_000)},
	{name: "64k", title: "64 KiB answers, keep-alive, closed loop", load: closed(request("/64k", false), large, false)},
	{name: "64kup", title: "64 KiB requests, keep-alive, closed loop", load: closed(upload("/path?query=1", large), 13, false)},
	{name: "new", title: "a new connection for each request", load: closed(request("/path?query=1", true), 13, true)},
	{name: "grpc", title: "gRPC, unary, 4 connections, 64 calls at once", h2: true, load: unary},
	{name: "idle1k", title: "1,000 idle connections, one request each", once: true, load: idle(1000)},
	{name: "idle9k", title: "9,000 idle connections, one request each", once: true, load: idle(9000)}, // within 20,000 open files, both ends

	{name: "held", title: fmt.Sprintf("%d requests at once through a limit of %d, function shut", heldRequests, heldLimit), once: true, load: held},
}

func rowNames() (s string) {
	for i, r := range []string{"small", "2k", "10k", "64k", "64kup", "new", "grpc", "idle1k", "idle9k", "held"} {
		if i > 0 {
			s += ","
		}
		s += r
	}
	return s
}

// measure gives each peer its turn in each round.
func (b *bench) measure(r row) (map[*peer][]result, error) {
	got := make(map[*peer][]result)
	for round := range *rounds {
		if r.once && round > 0 {
			break
		}
		for _, p := range b.peers {
			if p.h2 != r.h2 || p.name != "nginx" && !listed(*only, p.name) {
				continue
			}
			if !r.once {
				if _, err := r.load(b, p, *length/4); err != nil { // warm up
					return nil, fmt.Errorf("%s: %w", p.name, err)
				}
			}
			before, begin := p.cpu(), time.Now()
			res, err := r.load(b, p, *length)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", p.name, err)
			}
			res.us = (p.cpu() - before) / float64(res.n)
			res.rate = float64(res.n) / time.Since(begin).Seconds()
			if len(res.took) > 0 {
				slices.Sort(res.took)
				res.p50, res.p99 = res.took[len(res.took)/2], res.took[len(res.took)*99/100]
				res.took = nil
			}
			got[p] = append(got[p], res)
		}
	}
	return got, nil
}

// closed sends one request after the other over each connection, or over a new one each time.
func closed(send []byte, size int, newEach bool) func(*bench, *peer, time.Duration) (result, error) {
	return func(_ *bench, p *peer, d time.Duration) (result, error) {
		ctx, cancel := context.WithTimeout(context.Background(), d)
		defer cancel()
		return together(*clients, func() (r result, err error) {
			c := &client{addr: p.addr, size: size, br: bufio.NewReaderSize(nil, 16<<10)}
			defer c.close()
			for i := 0; ctx.Err() == nil; i++ {
				begin := time.Now()
				if err := c.do(send); err != nil {
					return r, err
				}
				if newEach {
					c.close()
				}
				if r.n++; i%16 == 0 {
					r.took = append(r.took, time.Since(begin))
				}
			}
			return r, nil
		})
	}
}

// together runs n of them at once and adds up what they did.
func together(n int, one func() (result, error)) (sum result, err error) {
	var mu sync.Mutex
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			r, e := one()
			mu.Lock()
			defer mu.Unlock()
			sum.n += r.n
			sum.took = append(sum.took, r.took...)
			err = errors.Join(err, e)
		})
	}
	wg.Wait()
	return sum, err
}

// client is one connection that is made when it is needed.
type client struct {
	addr string
	size int
	conn net.Conn
	br   *bufio.Reader
	resp fasthttp.Response
}

func (c *client) do(send []byte) error {
	if c.conn == nil {
		conn, err := net.Dial("tcp", c.addr)
		if err != nil {
			return err
		}
		c.conn = conn
		c.br.Reset(conn)
	}
	if _, err := c.conn.Write(send); err != nil {
		return err
	}
	return c.answer()
}

func (c *client) answer() error {
	if err := c.resp.Read(c.br); err != nil {
		return err
	}
	if c.resp.StatusCode() != 200 || len(c.resp.Body()) != c.size {
		return fmt.Errorf("answer %d with %d bytes", c.resp.StatusCode(), len(c.resp.Body()))
	}
	return nil
}

func (c *client) close() {
	if c.conn != nil {
		c.conn.Close()
		c.conn = nil
	}
}

// open sends at a fixed rate, whatever becomes of the answers.
func open(rate int) func(*bench, *peer, time.Duration) (result, error) {
	return func(_ *bench, p *peer, d time.Duration) (r result, err error) {
		target := vegeta.NewStaticTargeter(vegeta.Target{Method: "GET", URL: "http://" + p.addr + "/path?query=1", Header: http.Header{"User-Agent": {"bench"}}})
		at := vegeta.NewAttacker(vegeta.Workers(64), vegeta.MaxWorkers(512), vegeta.Connections(512), vegeta.HTTP2(false))
		defer at.Stop()
		for hit := range at.Attack(target, vegeta.Rate{Freq: rate, Per: time.Second}, d, p.name) {
			if hit.Error != "" || hit.Code != 200 {
				return r, fmt.Errorf("answer %d: %s", hit.Code, hit.Error)
			}
			r.n++
			r.took = append(r.took, hit.Latency)
		}
		return r, nil
	}
}

// unary calls the health service of gRPC.
func unary(_ *bench, p *peer, d time.Duration) (sum result, err error) {
	var conns []*grpc.ClientConn
	for range 4 {
		c, err := grpc.NewClient("passthrough:///"+p.addr, grpc.WithTransportCredentials(insecure.NewCredentials()))
		if err != nil {
			return sum, err
		}
		defer c.Close()
		conns = append(conns, c)
	}
	end := time.Now().Add(d)
	var mu sync.Mutex
	next := 0
	return together(64, func() (r result, err error) {
		mu.Lock()
		c := grpc_health_v1.NewHealthClient(conns[next%len(conns)])
		next++
		mu.Unlock()
		for i := 0; time.Now().Before(end); i++ {
			begin := time.Now()
			if _, err := c.Check(context.Background(), &grpc_health_v1.HealthCheckRequest{}); err != nil {
				return r, err
			}
			if r.n++; i%16 == 0 {
				r.took = append(r.took, time.Since(begin))
			}
		}
		return r, nil
	})
}

// settle is how long memory is given to come back before it is read.
const settle = 3 * time.Second

// idle makes connections that have had one request each, and keeps them.
func idle(n int) func(*bench, *peer, time.Duration) (result, error) {
	return func(_ *bench, p *peer, _ time.Duration) (r result, err error) {
		before := p.memory()
		br := bufio.NewReaderSize(nil, 16<<10)
		all := make([]client, n)
		defer func() {
			for i := range all {
				all[i].close()
			}
		}()
		send := request("/path?query=1", false)
		for i := range all {
			all[i].addr, all[i].size, all[i].br = p.addr, 13, br
			if err := all[i].do(send); err != nil {
				return r, fmt.Errorf("connection %d: %w", i, err)
			}
			r.n++
		}
		time.Sleep(settle)
		r.kib = (p.memory() - before) / float64(n)
		return r, nil
	}
}

const (
	heldRequests = 10_000
	heldLimit    = 1000
)

// held sends requests that cannot go on, measures what they occupy, and then lets them go.
func held(b *bench, p *peer, _ time.Duration) (r result, err error) {
	switch p.name {
	case "nginx", "nginx>nginx", "net/http":
		return result{n: 1, note: "has no queue"}, nil
	case "haproxy":
		return result{n: 1, note: "wants more open files than most machines allow for 10,000 connections"}, nil
	}
	before := p.memory()
	open := b.function.shut()
	send := request("/gate", false)
	all := make([]client, heldRequests)
	defer func() {
		for i := range all {
			all[i].close()
		}
	}()
	for i := range all {
		c := &all[i]
		if c.conn, err = net.Dial("tcp", p.addr); err != nil {
			open()
			return r, err
		}
		if _, err = c.conn.Write(send); err != nil {
			open()
			return r, err
		}
	}
	time.Sleep(settle)
	r.kib = (p.memory() - before) / heldRequests
	begin := time.Now()
	open()
	var lost int
	var wg sync.WaitGroup
	var mu sync.Mutex
	for i := range all {
		wg.Go(func() {
			c := &all[i]
			c.size, c.br = 13, bufio.NewReaderSize(c.conn, 512)
			c.conn.SetReadDeadline(time.Now().Add(20 * time.Second))
			if err := c.answer(); err != nil {
				mu.Lock()
				lost++
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	r.n = heldRequests
	r.note = fmt.Sprintf("released in %.2f s, %d lost", time.Since(begin).Seconds(), lost)
	return r, nil
}
