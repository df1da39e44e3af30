package instance

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/link"
)

// networks hands out namespaces made by a test; asked notes for what.
type networks struct {
	asked []string
	err   error
	inode uint64 // of the last one
	t     testing.TB
}

func (n *networks) Attach(namespace, subnet string) (*os.File, error) {
	n.asked = append(n.asked, namespace+" "+subnet)
	if n.err != nil {
		return nil, n.err
	}
	ns, err := link.NewNamespace()
	if err != nil {
		return nil, err
	}
	defer ns.Close()
	c, err := ns.Open()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	if err := c.SetUp("lo", true); err != nil {
		return nil, err
	}
	f, err := ns.File()
	if err != nil {
		return nil, err
	}
	n.inode = inodeOf(n.t, f)
	return f, nil
}

// TestSubnetsNetworkIsTheInstances: an instance of a revision with the annotation runs in the namespace that it was given, and is reached
// there; one without runs in its own.
func TestSubnetsNetworkIsTheInstances(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("sandboxes need root")
	}
	n := &networks{t: t}
	r := newRig(t, func(c *Config) { c.Provider, c.Networks = "sandbox", n })
	for i, subnet := range []string{"", "blue/web"} {
		rev := revisionOf(t, fmt.Sprintf("attached-0000%d", i), "ok")
		if subnet != "" {
			rev.Annotations[api.AnnotationSubnet] = subnet
		}
		r.SetRevision(rev)
		r.Scale(rev.ID(), 1, time.Now())
		s := r.ready(rev.ID(), 1)
		in := s.Instances[0]
		if got := inside(t, r.Agent, in, "/pid"); got != "1" {
			t.Errorf("%q: answered %q", subnet, got)
		}
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", noted(t, r.dir, s)[in.ID]))
		if err != nil {
			t.Fatal(err)
		}
		ino := inodeOf(t, f)
		f.Close()
		if subnet == "" {
			if len(n.asked) != 0 || !in.Start.Net.IsZero() {
				t.Errorf("without a subnet: asked for %q, attached at %v", n.asked, in.Start.Net)
			}
			continue
		}
		if len(n.asked) != 1 || n.asked[0] != "default "+subnet || ino != n.inode {
			t.Errorf("asked for %q; runs in %d, was given %d", n.asked, ino, n.inode)
		}
		if s := in.Start; s.Net.Before(s.Code) || s.Exec.Before(s.Net) {
			t.Errorf("attached at the wrong time: %+v", s)
		}
	}
}

func inodeOf(t testing.TB, f *os.File) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

// TestSubnetThatCannotBe says why, and starts nothing.
func TestSubnetThatCannotBe(t *testing.T) {
	cases := []struct {
		name, want string
		change     func(*Config)
		host, root bool
	}{
		{"no networks", "is not connected to networks", func(c *Config) { c.Provider = "sandbox" }, false, true},
		{"host network", "exclude each other", func(c *Config) { c.Provider = "process" }, true, false},
		{"processes", "needs instances with a network of their own", func(c *Config) { c.Provider, c.Networks = "process", &networks{} }, false, false},
		{"refused", "attach to subnet blue/web: pool empty", func(c *Config) { c.Provider, c.Networks = "sandbox", &networks{err: errors.New("pool empty")} }, false, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if c.root && os.Geteuid() != 0 {
				t.Skip("sandboxes need root")
			}
			r := newRig(t, c.change)
			rev := revisionOf(t, "attached-00001", "ok")
			rev.Annotations[api.AnnotationSubnet] = "blue/web"
			if c.host {
				rev.Annotations[api.AnnotationNetwork] = api.NetworkHost
			}
			r.SetRevision(rev)
			r.Scale(rev.ID(), 1, time.Now())
			f := r.until(rev.ID(), "a failure", func(s *endpoints.Snapshot) bool { return s.Failure != nil }).Failure
			if !strings.Contains(f.Message, c.want) {
				t.Errorf("failure %+v, want %q", f, c.want)
			}
		})
	}
}
