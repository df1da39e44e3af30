// Command cpu-burner uses processor time: ?ms=N burns N milliseconds of one processor (default 100, at most 60,000) and says how
// many primes it found meanwhile. It is made for watching instances follow the load.
package main

import (
	"fmt"
	"log"
	"net/http"
	"strconv"
	"time"

	"github.com/thawrun/thaw/examples/serve"
)

func main() {
	err := serve.Run(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ms := 100
		if v := r.URL.Query().Get("ms"); v != "" {
			n, err := strconv.Atoi(v)
			if err != nil || n < 0 || n > 60_000 {
				http.Error(w, "ms must be a number from 0 to 60000", http.StatusBadRequest)
				return
			}
			ms = n
		}
		began := time.Now()
		primes := burn(r, time.Duration(ms)*time.Millisecond)
		fmt.Fprintf(w, "%d primes in %s\n", primes, time.Since(began).Round(time.Millisecond))
	}))
	if err != nil {
		log.Fatal(err)
	}
}

// burn counts primes for d, or until the client has left.
func burn(r *http.Request, d time.Duration) int {
	count := 0
	end := time.Now().Add(d)
	for n := 2; ; n++ {
		if prime(n) {
			count++
		}
		if n%256 == 0 && (!time.Now().Before(end) || r.Context().Err() != nil) {
			return count
		}
	}
}

func prime(n int) bool {
	for d := 2; d*d <= n; d++ {
		if n%d == 0 {
			return false
		}
	}
	return true
}
