package cluster

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/internal/link/linktest"
	"github.com/thawrun/thaw/internal/state"
	"github.com/thawrun/thaw/test/harness"
)

const apartEnv = "THAW_TEST_APART"

// apart runs the test that calls it in namespaces of its own, network and mounts, by starting it again there: false here, true there.
func apart(t *testing.T) bool {
	t.Helper()
	if os.Getenv(apartEnv) != "" {
		if err := syscall.Mount("", "/", "", syscall.MS_REC|syscall.MS_PRIVATE, ""); err != nil {
			t.Fatal(err)
		}
		return true
	}
	cmd := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.v", "-test.timeout=10m")
	cmd.Env = append(os.Environ(), apartEnv+"=1", binEnv+"="+bin)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	out, err := cmd.CombinedOutput()
	if errors.Is(err, syscall.EPERM) {
		t.Skip("needs namespaces of its own, which the kernel refuses: ", err)
	}
	t.Logf("in namespaces of its own:\n%s", out)
	if err != nil {
		t.Error(err)
	}
	return false
}

// A node that is cut off, so that nothing comes from it and nothing gets there, is replaced by the others within ten seconds, while it goes on by itself; when
// it is back it gives up what others have taken over.
func TestPartition(t *testing.T) {
	faults(t)
	if !apart(t) {
		return
	}
	const here, there = "10.99.0.1", "10.99.0.2"
	main, err := link.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer main.Close()
	node, err := link.NewNamespace()
	if err != nil {
		t.Fatal(err)
	}
	defer node.Close()
	linktest.Up(t, node, "lo")
	linktest.Up(t, main, "lo")
	linktest.Cable(t, link.End{In: main, Name: "nodes"}, link.End{In: node, Name: "uplink"})
	linktest.Up(t, main, "nodes", here+"/24")
	linktest.Up(t, node, "uplink", there+"/24")
	fault{
		plan: plan{routers: 1, host: here, remote: there, in: node.Do},
		play: func(s *system) []string {
			return s.loseNode(func() { cut(s.t, node, "uplink") }, func() { mend(s.t, node) })
		},
		without: map[string][]harness.Change{"a watchdog": nodeLostLate},
	}.test(t)
}

// cut drops all that comes and goes by a device.
func cut(t *testing.T, ns *link.Namespace, device string) {
	t.Helper()
	c, err := ns.Rules()
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseLasting()
	table := c.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "cut"})
	for _, way := range []struct {
		name string
		hook *nftables.ChainHook
		key  expr.MetaKey
	}{{"in", nftables.ChainHookInput, expr.MetaKeyIIFNAME}, {"out", nftables.ChainHookOutput, expr.MetaKeyOIFNAME}} {
		chain := c.AddChain(&nftables.Chain{Name: way.name, Table: table, Type: nftables.ChainTypeFilter, Hooknum: way.hook, Priority: nftables.ChainPriorityFilter})
		name := make([]byte, 16)
		copy(name, device)
		c.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: way.key, Register: 1}, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name}, &expr.Verdict{Kind: expr.VerdictDrop},
		}})
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}

// mend takes back what cut did.
func mend(t *testing.T, ns *link.Namespace) {
	t.Helper()
	c, err := ns.Rules()
	if err != nil {
		t.Fatal(err)
	}
	defer c.CloseLasting()
	c.DelTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "cut"})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}

// etcd's disk is full: that is as if it did not answer, and when there is room again everything that was acknowledged is there.
func TestFullDisk(t *testing.T) {
	faults(t)
	if !apart(t) {
		return
	}
	main, err := link.Current()
	if err != nil {
		t.Fatal(err)
	}
	defer main.Close()
	linktest.Up(t, main, "lo")
	fault{
		plan: plan{routers: 1, before: func(t *testing.T, dir string) {
			disk := filepath.Join(dir, "etcd")
			if err := errors.Join(os.Mkdir(disk, 0o700), syscall.Mount("disk", disk, "tmpfs", 0, "size=200m,mode=700")); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := syscall.Unmount(disk, 0); err != nil {
					t.Error(err)
				}
			})
		}},
		play: func(s *system) []string {
			filler := filepath.Join(s.dir, "etcd", "filler")
			var kept []string
			broken := s.withoutState(10*time.Second, func() { kept = s.fill(filler) }, func() {
				if err := os.Remove(filler); err != nil {
					s.t.Error(err)
				}
				if p := s.procs["etcd"]; !p.Running() { // as whoever supervises it does
					s.t.Logf("etcd had ended: %s", harness.Tail(p.Log(), 300))
					s.again("etcd")
				}
			})
			for _, name := range kept {
				if _, err := s.client.Get(t.Context(), api.Services, "default", name); err != nil {
					broken = append(broken, "what was acknowledged: "+err.Error())
				}
			}
			s.t.Logf("%d objects were acknowledged before the disk was full", len(kept))
			return broken
		},
		without: map[string][]harness.Change{"owners that go on": ownersGiveUp},
	}.test(t)
}

// fill takes all the room on etcd's disk, writes until etcd takes no more, and returns the objects that it took.
func (s *system) fill(filler string) (kept []string) {
	s.t.Helper()
	store, err := state.Open(s.t.Context(), state.Config{Endpoints: strings.Split(s.etcd, ","), OpTimeout: 3 * time.Second})
	if err != nil {
		s.t.Fatal(err)
	}
	defer store.Close()
	f, err := os.Create(filler)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	for block := make([]byte, 1<<20); err == nil; {
		_, err = f.Write(block)
	}
	if !errors.Is(err, syscall.ENOSPC) {
		s.t.Fatal(err)
	}
	big := make([]byte, 1<<20)
	for i := range 1000 { // the log has room for some that was taken for it before
		if _, err := store.Put(s.t.Context(), fmt.Sprintf("/filler/%d", i%4), big, state.Any); err != nil {
			s.t.Logf("after %d MiB more: %v", i, err)
			return kept
		}
		if i%10 == 0 {
			name := fmt.Sprintf("kept-%d", i)
			if s.change(name) == nil {
				kept = append(kept, name)
			}
		}
	}
	s.t.Fatal("the disk is not full")
	return nil
}
