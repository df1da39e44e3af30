package havip

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"
)

// TestBench is make bench-havip: every failure many times, the check for false failovers for longer, and keepalived with conntrackd
// beside it where they are installed. It fails when a figure of docs/netproxy.md is missed.
func TestBench(t *testing.T) {
	busy, err := time.ParseDuration(os.Getenv("THAW_BENCH_HAVIP"))
	if err != nil {
		t.Skip("run by make bench-havip: THAW_BENCH_HAVIP is the time for which busy loops run")
	}
	if !realtimeAllowed() {
		t.Fatal("needs root")
	}
	l := newLab(t, labOptions{advert: tenMs, replicate: true})
	l.serve()
	l.up()
	for _, f := range failures {
		rounds := 3
		switch f.name {
		case "all links":
			rounds = 20
		case "ENI link only":
			rounds = 5
		}
		results := make([]result, rounds)
		for i := range results {
			results[i] = l.fail(50, 200, func() { f.do(l) }, func() { f.mend(l) })
			results[i].check(t, f.most)
		}
		if report("thaw havip, "+f.name, results) > 50 {
			t.Errorf("%s: outage p50 over 50 ms", f.name)
		}
	}
	began := time.Now()
	n := l.changesUnderLoad(busy)
	fmt.Printf("%-34s %d changes of role in %s\n", "thaw havip, busy loops", n, time.Since(began).Round(time.Second))
	if n != 0 {
		t.Errorf("%d false failovers", n)
	}
}

func TestBenchKeepalived(t *testing.T) {
	if os.Getenv("THAW_BENCH_HAVIP") == "" {
		t.Skip("run by make bench-havip")
	}
	for _, prog := range []string{"keepalived", "conntrackd"} {
		if _, err := exec.LookPath(prog); err != nil {
			t.Skip("needs keepalived and conntrackd for the comparison:", err)
		}
	}
	l := newLab(t, labOptions{advert: tenMs, replicate: true})
	l.serve()
	for i, r := range []*router{l.a, l.b} {
		r.startKeepalived(i)
	}
	ready := func() bool { return l.a.has(havip) && l.a.has(gateway) && !l.b.has(havip) }
	within(t, 20*time.Second, "keepalived on a has the addresses", ready)
	time.Sleep(3 * time.Second)
	results := make([]result, 5)
	for i := range results {
		results[i] = l.fail(50, 200, func() { l.a.cables(false) }, nil)
		l.a.cables(true)
		within(t, 20*time.Second, "keepalived on a has the addresses again", ready)
		time.Sleep(3 * time.Second) // it has no setting that waits for conntrackd
	}
	report("keepalived + conntrackd, all links", results)
}

// TestBesideKeepalived pairs a member with keepalived, in both orders: they understand each other's adverts.
func TestBesideKeepalived(t *testing.T) {
	if _, err := exec.LookPath("keepalived"); err != nil {
		t.Skip("needs keepalived:", err)
	}
	if os.Geteuid() != 0 || !realtimeAllowed() {
		t.Skip("keepalived needs root")
	}
	for i, name := range []string{"master", "backup"} {
		t.Run(name, func(t *testing.T) {
			l := newLab(t, labOptions{advert: tenMs})
			ours, other := l.a, l.b
			if i == 1 {
				ours, other = l.b, l.a
			}
			ours.start()
			other.startProgram("keepalived", 1-i)
			alone := func() bool {
				return l.a.has(havip) && l.a.has(gateway) && !l.b.has(havip) && !l.b.has(gateway)
			}
			// They would fight for ever if they did not understand each other. For a moment they may: keepalived has no real-time priority here.
			within(t, 30*time.Second, "a has the addresses alone, and keeps them", func() bool {
				for end := time.Now().Add(200 * time.Millisecond); time.Now().Before(end); time.Sleep(2 * time.Millisecond) {
					if !alone() {
						return false
					}
				}
				return true
			})
			l.a.cables(false)
			within(t, 5*time.Second, "b has the addresses", func() bool { return l.b.has(havip) })
			l.a.cables(true)
			within(t, 20*time.Second, "a has them again, alone", alone)
		})
	}
}

// report prints a line about all rounds and returns the median outage in ms.
func report(name string, results []result) int {
	var lost []int
	var sum result
	for _, r := range results {
		lost = append(lost, r.lost)
		sum.kept, sum.of = sum.kept+r.kept, sum.of+r.of
		sum.fresh, sum.freshOf = sum.fresh+r.fresh, sum.freshOf+r.freshOf
		sum.backLost = max(sum.backLost, r.backLost)
		sum.stall = max(sum.stall, r.stall)
	}
	slices.Sort(lost)
	p50 := lost[len(lost)/2]
	fmt.Printf("%-34s %2d rounds: outage p50 %d max %d ms; flows %d of %d, fresh %d of %d, longest stall %d ms; on return lost at most %d\n",
		name, len(results), p50, lost[len(lost)-1], sum.kept, sum.of, sum.fresh, sum.freshOf, sum.stall.Milliseconds(), sum.backLost)
	return p50
}

const keepalivedConf = `global_defs {
  script_user root
  enable_script_security
  vrrp_version 3
  vrrp_garp_master_delay 0
}
vrrp_instance pair {
  state BACKUP
  interface under
  virtual_router_id 51
  priority %d
  advert_int 0.01
  virtual_ipaddress {
    10.1.0.1/24 dev under
    10.2.0.10/24 dev eni
  }
  track_interface {
    under
    eni
  }
  notify_master "%s primary"
  notify_backup "%s backup"
  notify_fault "%s fault"
}
`

const conntrackdConf = `Sync {
  Mode FTFW {
    DisableExternalCache off
  }
  UDP {
    IPv4_address 10.9.0.%d
    IPv4_Destination_Address 10.9.0.%d
    Port 3780
    Interface sync
    SndSocketBuffer 8388608
    RcvSocketBuffer 8388608
    Checksum on
  }
}
General {
  HashSize 32768
  HashLimit 131072
  Syslog off
  LockFile %slock
  UNIX { Path %sctl }
  NetlinkBufferSize 8388608
  NetlinkBufferSizeMaxGrowth 33554432
  Filter From Kernelspace {
    Protocol Accept { TCP UDP ICMP }
    Address Ignore { IPv4_address 127.0.0.1 IPv4_address 10.9.0.1 IPv4_address 10.9.0.2 }
  }
}
`

// startKeepalived runs keepalived and conntrackd in a router's namespace, set up as conntrackd's manual has it, until the test ends.
func (r *router) startKeepalived(i int) {
	r.t.Helper()
	r.startProgram("conntrackd", i)
	time.Sleep(500 * time.Millisecond)
	r.startProgram("keepalived", i)
}

// startProgram runs one of the two in a router's namespace until the test ends. i is 0 for the one with the higher priority.
func (r *router) startProgram(name string, i int) {
	r.t.Helper()
	dir := filepath.Dir(r.status)
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, r.name+name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			r.t.Fatal(err)
		}
		return path
	}
	run := filepath.Join(dir, r.name)
	conf := write("conntrackd.conf", fmt.Sprintf(conntrackdConf, 1+i, 2-i, run, run), 0o600)
	script := write("notify", `#!/bin/sh
c="conntrackd -C `+conf+`"
case "$1" in
primary) $c -c; $c -f; $c -R; $c -B ;;
backup) $c -t; $c -n ;;
fault) $c -t ;;
esac
`, 0o700)
	args := []string{"-C", conf}
	if name == "keepalived" {
		kconf := write("keepalived.conf", fmt.Sprintf(keepalivedConf, 200-100*i, script, script, script), 0o600)
		args = []string{"-n", "-P", "-l", "-f", kconf, "-p", run + "pid", "-r", run + "vrrp.pid"}
	}
	cmd := exec.Command(name, args...)
	log, err := os.Create(run + name + ".log")
	if err != nil {
		r.t.Fatal(err)
	}
	cmd.Stdout, cmd.Stderr = log, log
	if err := r.ns.Do(cmd.Start); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		_ = cmd.Wait()
		log.Close()
		if r.t.Failed() {
			out, _ := os.ReadFile(log.Name())
			r.t.Logf("%s:\n%s", name, out)
		}
	})
}
