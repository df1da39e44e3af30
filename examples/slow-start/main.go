// Command slow-start takes a while until it listens, as programs that load a model or fill a cache do. START_MS says how many
// milliseconds (default 3000). Requests that come meanwhile wait; none is lost.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"
	"strconv"
	"time"

	"github.com/thawrun/thaw/examples/serve"
)

func main() {
	ms := 3000
	if v := os.Getenv("START_MS"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 0 {
			log.Fatalf("START_MS=%q is no number of milliseconds", v)
		}
		ms = n
	}
	began := time.Now()
	log.Printf("slow-start gets ready for %d ms", ms)
	time.Sleep(time.Duration(ms) * time.Millisecond)
	took := time.Since(began).Round(time.Millisecond)
	log.Printf("slow-start listens after %s", took)
	err := serve.Run(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "ready after %s\n", took)
	}))
	if err != nil {
		log.Fatal(err)
	}
}
