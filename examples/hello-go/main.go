// Command hello-go is the smallest function: an HTTP server on the port in PORT that ends when it is asked to.
package main

import (
	"context"
	"fmt"
	"log"
	"net/http"
	"os"
	"os/signal"
	"syscall"
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
	srv := &http.Server{Addr: ":" + port}

	// On SIGTERM the platform sends nothing new; what is under way is answered before the program ends.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	drained := make(chan struct{})
	go func() {
		defer close(drained)
		<-ctx.Done()
		_ = srv.Shutdown(context.Background())
	}()

	log.Printf("hello-go listens on port %s", port)
	if err := srv.ListenAndServe(); err != http.ErrServerClosed {
		log.Fatal(err)
	}
	<-drained
}
