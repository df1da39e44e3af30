package instance

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// BenchmarkColdStart starts one instance of a small Go HTTP server (this test binary) at a time, from Scale to the
// delivered snapshot with it ready. "bare" is the floor: fork, exec and a tight connect loop without anything around it.
func BenchmarkColdStart(b *testing.B) {
	for _, socket := range []bool{false, true} {
		b.Run(fmt.Sprintf("agent/socket=%v", socket), func(b *testing.B) {
			r := newRig(b, nil)
			rev := revisionOf(b, "bench-00001", "ok")
			if socket {
				rev.Annotations[api.AnnotationSocket] = "fd3"
				rev.Status.Conditions.Set(time.Now(), api.ConditionReady, api.True, "", "")
			}
			r.SetRevision(rev)
			var total, exec, ready sample
			for b.Loop() {
				began := time.Now()
				r.Scale(rev.ID(), 1, began)
				in := r.ready(rev.ID(), 1).Instances[0]
				total.add(time.Since(began))
				exec.add(in.Start.Exec.Sub(began))
				ready.add(in.Start.Ready.Sub(in.Start.Exec))
				b.StopTimer()
				r.Scale(rev.ID(), 0, time.Now())
				r.ready(rev.ID(), 0)
				for len(r.berths.ready) < berthsAhead { // the state of an agent that had time to prepare
					nap(time.Millisecond)
				}
				b.StartTimer()
			}
			total.report(b, "total")
			exec.report(b, "exec")
			ready.report(b, "ready")
		})
	}
	b.Run("bare", func(b *testing.B) {
		var total, started sample
		self, _ := os.Executable()
		for i := 0; b.Loop(); i++ {
			addr := fmt.Sprintf("127.0.0.1:%d", 19000+i%500)
			_, port, _ := net.SplitHostPort(addr)
			began := time.Now()
			cmd := exec.Command(self)
			cmd.Env = []string{"THAW_TEST_FUNCTION=ok", "PORT=" + port}
			if err := cmd.Start(); err != nil {
				b.Fatal(err)
			}
			started.add(time.Since(began))
			for {
				c, err := net.Dial("tcp", addr)
				if err == nil {
					c.Close()
					break
				}
				nap(100 * time.Microsecond)
			}
			total.add(time.Since(began))
			b.StopTimer()
			cmd.Process.Kill()
			cmd.Wait()
			time.Sleep(25 * time.Millisecond) // as idle as the agent is between two starts
			b.StartTimer()
		}
		total.report(b, "total")
		started.report(b, "exec")
	})
}

// BenchmarkBurst orders 50 instances at once.
func BenchmarkBurst(b *testing.B) {
	r := newRig(b, nil)
	rev := revisionOf(b, "burst-00001", "ok")
	r.SetRevision(rev)
	const n = 50
	for b.Loop() {
		r.Scale(rev.ID(), n, time.Now())
		r.until(rev.ID(), "all ready", func(s *endpoints.Snapshot) bool { return s.Count(endpoints.Ready) == n })
		b.StopTimer()
		r.Scale(rev.ID(), 0, time.Now())
		r.collector.ready(rev.ID(), 0)
		b.StartTimer()
	}
	b.ReportMetric(float64(n*b.N)/b.Elapsed().Seconds(), "instances/s")
}

type sample []time.Duration

func (s *sample) add(d time.Duration) { *s = append(*s, d) }

func (s sample) report(b *testing.B, name string) {
	slices.Sort(s)
	b.ReportMetric(float64(s[len(s)/2].Microseconds()), name+"-p50-us")
	b.ReportMetric(float64(s[len(s)*99/100].Microseconds()), name+"-p99-us")
}
