// Command function tells what a function sees of its platform: tests compare it with what the runtime contract promises.
//
// Every path but the ones below answers with a report as JSON. /ready and /alive are for probes: /ready says 200 once READY_MS have
// passed since the start, /alive until somebody has called /poison. LISTEN_MS delays listening. When READY_MS have passed there is
// also a file "ready" in TMPDIR, for probes that are commands. /call?host=HOST asks HOST at the address ROUTER and tells when both were
// started; with pass=yes it passes the names of its own request on, as a function that takes part in tracing does. /stat, /read and /write do
// that to the file named in the query (path). /talk?to=ADDR tells how the one
// connection (or n=N) to ADDR fares that its first call has opened, with a line each 10 ms, or pause=MS. STUBBORN=1 ignores SIGTERM; otherwise a line says that it has come.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

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
	UID     int               `json:"uid"`
	EUID    int               `json:"euid"`
	FDs     []int             `json:"fds"` // descriptors that were open at the start
	Started time.Time         `json:"started"`
	Probes  int64             `json:"probes"` // calls of /ready and /alive so far
	Probe   http.Header       `json:"probe"`  // headers of the last of them
}

// inherited are descriptors that were there before this program: what it opens itself, as Go's runtime does with the files of its
// control group, is closed by the next exec.
var inherited = func() (fds []int) {
	for fd := range 1024 {
		if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err == nil && flags&unix.FD_CLOEXEC == 0 {
			fds = append(fds, fd)
		}
	}
	return fds
}()

// stat tells type and permissions of a file, a link's target too.
func stat(w http.ResponseWriter, r *http.Request) {
	path := r.URL.Query().Get("path")
	fi, err := os.Stat(path)
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	link, _ := os.Readlink(path)
	fmt.Fprintf(w, "%v %s %s", fi.IsDir(), fi.Mode().Perm().String()[1:], link)
}

// read answers with the beginning of a file.
func read(w http.ResponseWriter, r *http.Request) {
	f, err := os.Open(r.URL.Query().Get("path"))
	if err != nil {
		http.Error(w, err.Error(), http.StatusNotFound)
		return
	}
	defer f.Close()
	_, _ = io.Copy(w, io.LimitReader(f, 64<<10))
}

// write writes to a file that is there.
func write(w http.ResponseWriter, r *http.Request) {
	f, err := os.OpenFile(r.URL.Query().Get("path"), os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteString("9")
		f.Close()
	}
	if err != nil {
		http.Error(w, err.Error(), http.StatusForbidden)
	}
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

// call is a call of another function.
func call(w http.ResponseWriter, r *http.Request, started time.Time) {
	req, err := http.NewRequestWithContext(r.Context(), "GET", "http://"+os.Getenv("ROUTER")+"/", nil)
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	req.Host = r.URL.Query().Get("host")
	if r.URL.Query().Get("pass") == "yes" {
		for _, name := range []string{"X-Request-Id", "Traceparent"} {
			if v := r.Header.Get(name); v != "" {
				req.Header.Set(name, v)
			}
		}
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	defer resp.Body.Close()
	var callee report
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&callee); err != nil {
		http.Error(w, err.Error(), http.StatusBadGateway)
		return
	}
	_ = json.NewEncoder(w).Encode(map[string]time.Time{"caller": started, "callee": callee.Started})
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
			Stdin: stdin.Load().(string), Temp: writable("/tmp"), Home: writable(os.Getenv("HOME")), Pid: os.Getpid(), UID: os.Getuid(), EUID: os.Geteuid(), FDs: inherited,
			Started: started, Probes: probes.Load(), Probe: *probe.Load(),
		})
	}
	isReady := probed(func() bool { return time.Since(started) >= ready })
	isAlive := probed(func() bool { return !poisoned.Load() })
	terminated := make(chan os.Signal, 1)
	if os.Getenv("STUBBORN") == "" {
		signal.Notify(terminated, syscall.SIGTERM)
	}
	time.Sleep(milliseconds("LISTEN_MS"))
	run := serve.Run
	if os.Getenv("STUBBORN") != "" {
		signal.Ignore(syscall.SIGTERM)
		run = func(h http.Handler) error { return http.ListenAndServe(":"+os.Getenv("PORT"), h) }
	}
	err := run(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path { // no ServeMux: it would clean paths
		case "/ready":
			isReady(w, r)
		case "/alive":
			isAlive(w, r)
		case "/call":
			call(w, r, started)
		case "/talk":
			talk(w, r)
		case "/poison":
			poisoned.Store(true)
		case "/stat":
			stat(w, r)
		case "/read":
			read(w, r)
		case "/write":
			write(w, r)
		default:
			describe(w, r)
		}
	}))
	if err != nil {
		log.Fatal(err)
	}
	select { // what made it end comes here too
	case s := <-terminated:
		fmt.Println("signal:", s)
	case <-time.After(time.Second):
	}
}
