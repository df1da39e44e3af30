// Command hello-go is the smallest function: an HTTP server on the port in PORT that ends when it is asked to.
package main

import (
	"fmt"
	"log"
	"net/http"
	"os"

	"github.com/thawrun/thaw/examples/serve"
)

func main() {
	target := os.Getenv("TARGET")
	if target == "" {
		target = "World"
	}
	port := os.Getenv("PORT")
	if port == "" {
		port = "8080"
	}
	http.HandleFunc("/", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "Hello %s from Go, revision %s\n", target, os.Getenv("K_REVISION"))
	})
	// The socket may have been handed over; on SIGTERM what is under way is answered before the program ends (package serve).
	ln, err := serve.Listen()
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("hello-go listens on port %s", port)
	if err := serve.On(ln, http.DefaultServeMux); err != nil {
		log.Fatal(err)
	}
}
