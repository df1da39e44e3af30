// Command checker is a function that watches its platform: it counts the requests inside itself, remembers every request id
// that it has seen, and does on demand what functions do at their worst. Tests deploy it and compare what it reports with
// what the platform promises.
//
// What to do is asked for in the query, in this order of effect:
//
//	sleep=MS   wait before answering
//	cpu=MS     burn processor time before answering
//	crash=N    exit with N, before answering
//	hang=1     never answer (until the client leaves)
//	reset=1    end the connection without an answer
//	status=N   answer with that status (default 200)
//	body=N     answer with N bytes of text in place of the report
//	stream=N   answer in N pieces, every=MS apart (default 10)
//	echo=1     answer with the body of the request
//
// Each answer carries X-Checker-Instance, X-Checker-In-Flight (requests inside as this one came in, itself counted),
// X-Checker-Max-In-Flight (the most there ever were) and X-Checker-Seen (how often this request id has come to this
// instance), and, unless it is the first, X-Checker-Idle (microseconds for which nothing had been inside). The body is the same as JSON, with the id.
//
// GET /report tells all that the instance knows and counts as no request. With CHECKER_LOG naming a folder each instance
// also appends each request id that it gets to a file of its own there, before doing anything, so that a delivery whose
// answer was lost leaves a trace too; with CHECKER_LOG=- it prints "started" once and "request ID" for each, for platforms whose
// functions see no folder of the machine. CHECKER_START_MS delays listening.
package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"maps"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/thawrun/thaw/examples/serve"
)

// report is what an instance knows about itself.
type report struct {
	Instance    string         `json:"instance"`
	Revision    string         `json:"revision"`
	Started     time.Time      `json:"started"`
	InFlight    int            `json:"inFlight"`
	MaxInFlight int            `json:"maxInFlight"`
	Requests    int            `json:"requests"`
	Duplicates  int            `json:"duplicates"` // deliveries of an id that had been here before
	Seen        map[string]int `json:"seen,omitempty"`
	ID          string         `json:"id,omitempty"` // of the request that is answered
	Idle        time.Duration  `json:"-"`            // before it, nothing had been inside; below 0 = never
}

type checker struct {
	log    *os.File // nil = none
	prefix string   // of each line in it

	mu     sync.Mutex
	report report    // guarded by mu; Seen holds the deliveries per request id
	left   time.Time // when the last request left; guarded by mu
}

func newChecker(instance, revision, logDir string) (*checker, error) {
	c := &checker{report: report{Instance: instance, Revision: revision, Started: time.Now(), Seen: map[string]int{}}}
	switch logDir {
	case "":
		return c, nil
	case "-":
		c.log, c.prefix = os.Stdout, "request "
		_, err := fmt.Println("started")
		return c, err
	}
	var err error
	c.log, err = os.OpenFile(filepath.Join(logDir, filepath.Base(instance)+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	return c, err
}

// enter counts a request in and returns the numbers as it found them.
func (c *checker) enter(id string) (now report, seen int, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := &c.report
	switch {
	case c.left.IsZero():
		r.Idle = -1
	case r.InFlight > 0:
		r.Idle = 0
	default:
		r.Idle = time.Since(c.left)
	}
	r.InFlight++
	r.MaxInFlight = max(r.MaxInFlight, r.InFlight)
	r.Requests++
	if id != "" {
		if c.log != nil {
			if _, err := c.log.WriteString(c.prefix + id + "\n"); err != nil {
				return *r, 0, err
			}
		}
		r.Seen[id]++
		if seen = r.Seen[id]; seen > 1 {
			r.Duplicates++
		}
	}
	now = *r
	now.Seen, now.ID = nil, id
	return now, seen, nil
}

func (c *checker) leave() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.report.InFlight--
	c.left = time.Now()
}

func (c *checker) all() report {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.report
	r.Seen = maps.Clone(r.Seen)
	return r
}

// order is what a request asks for.
type order struct {
	sleep, cpu, every     time.Duration
	crash                 int // below 0 = no
	hang, reset, echo     bool
	status, body, streams int
}

func parseOrder(r *http.Request) (order, error) {
	o := order{crash: -1, status: http.StatusOK, body: -1, every: 10 * time.Millisecond}
	for k, values := range r.URL.Query() {
		n, err := strconv.Atoi(values[0])
		if err != nil || n < 0 || n > 1<<30 {
			return o, fmt.Errorf("%s=%q is no number", k, values[0])
		}
		ms := time.Duration(n) * time.Millisecond
		switch k {
		case "sleep":
			o.sleep = ms
		case "cpu":
			o.cpu = ms
		case "every":
			o.every = ms
		case "crash":
			o.crash = n
		case "hang":
			o.hang = n != 0
		case "reset":
			o.reset = n != 0
		case "echo":
			o.echo = n != 0
		case "status":
			if n < 200 || n > 599 {
				return o, fmt.Errorf("status=%d is none that can be sent", n)
			}
			o.status = n
		case "body":
			o.body = n
		case "stream":
			o.streams = n
		default:
			return o, fmt.Errorf("unknown order %q", k)
		}
	}
	return o, nil
}

func (c *checker) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.URL.Path == "/report" {
		writeJSON(w, c.all())
		return
	}
	now, seen, err := c.enter(r.Header.Get("X-Request-Id"))
	defer c.leave()
	if err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	o, err := parseOrder(r)
	if err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	if !before(r, o) {
		return
	}
	h := w.Header()
	h.Set("X-Checker-Instance", now.Instance)
	h.Set("X-Checker-In-Flight", strconv.Itoa(now.InFlight))
	h.Set("X-Checker-Max-In-Flight", strconv.Itoa(now.MaxInFlight))
	h.Set("X-Checker-Seen", strconv.Itoa(seen))
	if now.Idle >= 0 {
		h.Set("X-Checker-Idle", strconv.FormatInt(now.Idle.Microseconds(), 10))
	}
	answer(w, r, o, now)
}

// before does what comes before the answer; false means that there is none.
func before(r *http.Request, o order) bool {
	if o.sleep > 0 {
		select {
		case <-time.After(o.sleep):
		case <-r.Context().Done():
			return false
		}
	}
	for end := time.Now().Add(o.cpu); o.cpu > 0 && time.Now().Before(end); {
	}
	if o.crash >= 0 {
		fmt.Fprintf(os.Stderr, "checker: told to exit with %d\n", o.crash)
		os.Exit(o.crash)
	}
	if o.hang {
		<-r.Context().Done()
		return false
	}
	if o.reset {
		panic(http.ErrAbortHandler)
	}
	return true
}

func answer(w http.ResponseWriter, r *http.Request, o order, now report) {
	switch {
	case o.echo:
		w.Header().Set("Content-Type", "application/octet-stream")
		// Without this the server throws away a part of a large body once the answer has begun.
		_ = http.NewResponseController(w).EnableFullDuplex()
		w.WriteHeader(o.status)
		if _, err := io.Copy(w, r.Body); err != nil {
			panic(http.ErrAbortHandler) // a part must not look like the whole
		}
	case o.streams > 0:
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.WriteHeader(o.status)
		flush := http.NewResponseController(w)
		for i := range o.streams {
			if i > 0 {
				select {
				case <-time.After(o.every):
				case <-r.Context().Done():
					return
				}
			}
			fmt.Fprintf(w, "piece %d of %d\n", i+1, o.streams)
			_ = flush.Flush()
		}
	case o.body >= 0:
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		w.Header().Set("Content-Length", strconv.Itoa(o.body))
		w.WriteHeader(o.status)
		_, _ = io.CopyN(w, letters{}, int64(o.body))
	default:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(o.status)
		_ = json.NewEncoder(w).Encode(now)
	}
}

func writeJSON(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(v)
}

// letters is text without end.
type letters struct{}

var lettersText = []byte(strings.Repeat("0123456789abcdefghijklmnopqrstuvwxyz-thaw-checker-0123456789abc\n", 64))

func (letters) Read(p []byte) (int, error) {
	n := 0
	for n < len(p) {
		n += copy(p[n:], lettersText)
	}
	return n, nil
}

func main() {
	if ms, err := strconv.Atoi(os.Getenv("CHECKER_START_MS")); err == nil && ms > 0 {
		time.Sleep(time.Duration(ms) * time.Millisecond)
	}
	host, _ := os.Hostname()
	instance := cmp.Or(os.Getenv("THAW_INSTANCE"), fmt.Sprintf("%s-%d-%d", host, os.Getpid(), time.Now().UnixNano()))
	c, err := newChecker(instance, os.Getenv("K_REVISION"), os.Getenv("CHECKER_LOG"))
	if err != nil {
		log.Fatal(err)
	}
	if err := serve.Run(c); err != nil {
		log.Fatal(err)
	}
}
