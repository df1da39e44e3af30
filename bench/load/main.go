// Command load sends requests to a cluster (or anything else that speaks HTTP) at a steady rate, whatever comes back, and prints vegeta's report.
//
//	go run ./bench/load -rate 200 -duration 10s -host hello.default.localhost http://127.0.0.1:8080/
package main

import (
	"flag"
	"log"
	"net/http"
	"os"
	"time"

	vegeta "github.com/tsenart/vegeta/v12/lib"
)

func main() {
	rate := flag.Int("rate", 200, "requests a second")
	duration := flag.Duration("duration", 10*time.Second, "for how long")
	host := flag.String("host", "", "Host of the requests; empty = the URL's")
	flag.Parse()
	if flag.NArg() != 1 || *rate < 1 {
		log.Fatal("usage: load [-rate N] [-duration D] [-host HOST] URL")
	}
	target := vegeta.Target{Method: http.MethodGet, URL: flag.Arg(0), Header: http.Header{}}
	if *host != "" {
		target.Header.Set("Host", *host)
	}
	var m vegeta.Metrics
	for r := range vegeta.NewAttacker().Attack(vegeta.NewStaticTargeter(target), vegeta.Rate{Freq: *rate, Per: time.Second}, *duration, "load") {
		m.Add(r)
	}
	m.Close()
	if err := vegeta.NewTextReporter(&m).Report(os.Stdout); err != nil {
		log.Fatal(err)
	}
	if m.Success < 1 {
		os.Exit(1)
	}
}
