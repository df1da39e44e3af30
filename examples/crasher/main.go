// Command crasher dies in the ways that functions die. CRASH says how: "start" (the default) prints a reason and exits with 3
// before it listens; "request" listens and exits in the middle of the first answer; "never" is for comparison.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"

	"github.com/thawrun/thaw/examples/serve"
)

func main() {
	mode := os.Getenv("CRASH")
	switch mode {
	case "", "start":
		fmt.Fprintln(os.Stderr, "crasher: cannot open the database: no such file (this is what it is made for)")
		os.Exit(3)
	case "request", "never":
	default:
		log.Fatalf("CRASH=%q: known are start, request and never", mode)
	}
	err := serve.Run(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		if mode == "request" {
			w.Header().Set("Content-Length", "1000")
			fmt.Fprint(w, "half of ")
			_ = http.NewResponseController(w).Flush()
			fmt.Fprintln(os.Stderr, "crasher: dying in the middle of an answer")
			os.Exit(4)
		}
		fmt.Fprintln(w, "alive")
	}))
	if err != nil {
		log.Fatal(err)
	}
}
