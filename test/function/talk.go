package main

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// conversation is a connection over which a line is said again and again, and answered. It is never opened a second time.
type conversation struct {
	mu      sync.Mutex
	Answers int    `json:"answers"`
	Last    string `json:"last"`  // of them
	Error   string `json:"error"` // that ended it
}

var (
	conversationsMu sync.Mutex
	conversations   = map[string][]*conversation{}
	pause           atomic.Int64 // milliseconds between two lines
)

// talk begins conversations, or tells how they go.
func talk(w http.ResponseWriter, r *http.Request) {
	to := r.URL.Query().Get("to")
	n, ms := 1, 10
	for name, at := range map[string]*int{"n": &n, "pause": &ms} {
		if v, err := strconv.Atoi(r.URL.Query().Get(name)); err == nil {
			*at = v
		}
	}
	pause.Store(int64(ms))
	conversationsMu.Lock()
	defer conversationsMu.Unlock()
	for len(conversations[to]) < n {
		c := &conversation{}
		conversations[to] = append(conversations[to], c)
		go c.run(to)
	}
	var all []conversation
	for _, c := range conversations[to] {
		c.mu.Lock()
		all = append(all, conversation{Answers: c.Answers, Last: c.Last, Error: c.Error})
		c.mu.Unlock()
	}
	_ = json.NewEncoder(w).Encode(all)
}

func (c *conversation) run(to string) {
	err := func() error {
		conn, err := net.DialTimeout("tcp4", to, 20*time.Second)
		if err != nil {
			return err
		}
		defer conn.Close()
		for r := bufio.NewReader(conn); ; time.Sleep(time.Duration(pause.Load()) * time.Millisecond) {
			if _, err := fmt.Fprintln(conn, "hello"); err != nil {
				return err
			}
			line, err := r.ReadString('\n')
			if err != nil {
				return err
			}
			c.mu.Lock()
			c.Answers++
			c.Last = strings.TrimSpace(line)
			c.mu.Unlock()
		}
	}()
	c.mu.Lock()
	defer c.mu.Unlock()
	c.Error = err.Error()
}
