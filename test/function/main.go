// Command function tells what a function sees of its platform: tests compare it with what the runtime contract promises.
//
// Every path but the ones below answers with a report as JSON. /ready and /alive are for probes: /ready says 200 once READY_MS have
// passed since the start, /alive until somebody has called /poison. LISTEN_MS delays listening. When READY_MS have passed there is
// also a file "ready" in TMPDIR, for probes that are commands.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/examples/serve"
)

// report is what an instance sees.
type report struct {
	Args    []string          `json:"args"`
	Dir     string            `json:"dir"`
	Env     map[string]string `json:"env"`
	Host    string            `json:"host"`
	Headers http.Header       `json:"headers"`
	Method  string            `json:"method"`
	URI     string            `json:"uri"`
	Stdin   string            `json:"stdin"` // "EOF", or what else came of reading it; "open" if nothing did
	Temp    string            `json:"temp"`  // error of writing a file to /tmp; "" = none
	Home    string            `json:"home"`  // the same for HOME
	Pid     int               `json:"pid"`
	Started time.Time         `json:"started"`
	Probes  int64             `json:"probes"` // calls of /ready and /alive so far
	Probe   http.Header       `json:"probe"`  // headers of the last of them
}

func writable(dir string) string {
	f, err := os.CreateTemp(dir, "function-")
	if err != nil {
		return err.Error()
	}
	_, err = f.WriteString("x")
	if err := errors.Join(err, f.Close(), os.Remove(f.Name())); err != nil {
		return err.Error()
	}
	return ""
}

func milliseconds(name string) time.Duration {
	n, err := strconv.Atoi(os.Getenv(name))
	if err != nil && os.Getenv(name) != "" {
		log.Fatalf("%s: %v", name, err)
	}
	return time.Duration(n) * time.Millisecond
}

func main() {
	started := time.Now()
	var stdin atomic.Value
	stdin.Store("open")
	go func() {
		b, err := io.ReadAll(os.Stdin)
		switch {
		case err != nil:
			stdin.Store(err.Error())
		case len(b) > 0:
			stdin.Store(fmt.Sprintf("%d bytes", len(b)))
		default:
			stdin.Store("EOF")
		}
	}()
	var poisoned atomic.Bool
	var probes atomic.Int64
	var probe atomic.Pointer[http.Header]
	probe.Store(&http.Header{})
	ready := milliseconds("READY_MS")
	time.AfterFunc(ready, func() {
		if err := os.WriteFile(filepath.Join(os.Getenv("TMPDIR"), "ready"), nil, 0o600); err != nil {
			log.Print(err)
		}
	})
	probed := func(ok func() bool) http.HandlerFunc {
		return func(w http.ResponseWriter, r *http.Request) {
			probes.Add(1)
			h := r.Header.Clone()
			probe.Store(&h)
			if !ok() {
				http.Error(w, "no", http.StatusServiceUnavailable)
			}
		}
	}
	describe := func(w http.ResponseWriter, r *http.Request) {
		dir, _ := os.Getwd()
		env := map[string]string{}
		for _, kv := range os.Environ() {
			k, v, _ := strings.Cut(kv, "=")
			env[k] = v
		}
		w.Header().Set("Content-Type", "application/json")
		_ = json.NewEncoder(w).Encode(report{
			Args: os.Args, Dir: dir, Env: env, Host: r.Host, Headers: r.Header, Method: r.Method, URI: r.RequestURI,
			Stdin: stdin.Load().(string), Temp: writable("/tmp"), Home: writable(os.Getenv("HOME")), Pid: os.Getpid(),
			Started: started, Probes: probes.Load(), Probe: *probe.Load(),
		})
	}
	isReady := probed(func() bool { return time.Since(started) >= ready })
	isAlive := probed(func() bool { return !poisoned.Load() })
	time.Sleep(milliseconds("LISTEN_MS"))
	err := serve.Run(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path { // no ServeMux: it would clean paths
		case "/ready":
			isReady(w, r)
		case "/alive":
			isAlive(w, r)
		case "/poison":
			poisoned.Store(true)
		default:
			describe(w, r)
		}
	}))
	if err != nil {
		log.Fatal(err)
	}
}
