// Command function serves the traffic of package protocols: gRPC if PROTOCOL is grpc; else HTTP, in HTTP/1 and in HTTP/2 with prior
// knowledge on the same port. LISTEN_MS delays listening.
package main

import (
	"log"
	"net/http"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"github.com/thawrun/thaw/examples/serve"
	"github.com/thawrun/thaw/test/protocols"
)

func main() {
	if n, err := strconv.Atoi(os.Getenv("LISTEN_MS")); err == nil {
		time.Sleep(time.Duration(n) * time.Millisecond)
	}
	ln, err := serve.Listen()
	if err != nil {
		log.Fatal(err)
	}
	if os.Getenv("PROTOCOL") == "grpc" {
		s := protocols.GRPC()
		stop := make(chan os.Signal, 1)
		signal.Notify(stop, syscall.SIGTERM)
		go func() { <-stop; s.GracefulStop() }()
		err = s.Serve(ln)
	} else {
		err = protocols.Server(protocols.HTTP()).Serve(ln)
	}
	if err != nil && err != http.ErrServerClosed {
		log.Fatal(err)
	}
}
