// Package networks runs `thaw dev --networks` in a network namespace, with a tenant's network beside it.
package networks

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/test/harness"
)

const insideEnv = "THAW_TEST_NETNS"

var (
	bin     string
	unfit   string // why nothing can be tested here
	patient = 60 * time.Second
)

// TestMain runs the tests in a network namespace, so that nothing they make is the machine's.
func TestMain(m *testing.M) {
	if os.Getenv(insideEnv) == "" && os.Getuid() == 0 {
		cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
		cmd.Env = append(os.Environ(), insideEnv+"=1")
		cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
		if err := cmd.Run(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if os.Getuid() != 0 {
		unfit = "networks of tenants need root"
	} else if c, err := link.Open(); err != nil {
		unfit = err.Error()
	} else if err := c.SetUp("lo", true); err != nil {
		unfit = err.Error()
	}
	os.Exit(harness.Main(m, &bin, "cmd/thaw", "test/function"))
}

// phase is one of a Server-Timing header's, in milliseconds; -1 = it is not there.
func phase(timing, name string) float64 {
	for entry := range strings.SplitSeq(timing, ", ") {
		if value, ok := strings.CutPrefix(entry, name+";dur="); ok {
			if ms, err := strconv.ParseFloat(value, 64); err == nil {
				return ms
			}
		}
	}
	return -1
}

// A function with the annotation reaches the tenant's server, under the subnet's address; one without it does not.
func TestFunctionInSubnet(t *testing.T) {
	if unfit != "" {
		t.Skip(unfit)
	}
	shop := newTenant(t, "shop")
	th := harness.Start(t, bin, "--networks", "--provider", "sandbox")
	// The function is there before its network.
	doc := strings.ReplaceAll(service("inside", "net.thaw.run/subnet: shop/a"), "$BIN", bin)
	if code, _, stderr := th.Verb(doc, "apply", "-f", "-", "--no-wait"); code != 0 {
		t.Fatal(stderr)
	}
	harness.Eventually(t, patient, "the revision says what is missing", func() bool {
		o, err := th.Client.Get(t.Context(), api.Revisions, "default", "inside-00001")
		return err == nil && o.(*api.Revision).Status.Conditions.IsFalse(api.ConditionNetworkReady)
	})
	verb(t, th, "vpc", "create", "shop", "--cidr", "10.0.0.0/16")
	verb(t, th, "subnet", "create", "a", "--vpc", "shop", "--cidr", subnet, "--bridge", shop.bridge)
	ctx, cancel := context.WithTimeout(t.Context(), patient)
	defer cancel()
	if _, err := th.Client.WaitReady(ctx, api.Services, "default", "inside", client.WaitOptions{}); err != nil {
		_, gw, _ := th.Verb("", "gateway", "describe", "a")
		_, rev, _ := th.Verb("", "list", "revisions", "-o", "yaml")
		t.Fatalf("%v\n%s\n%s", err, gw, rev)
	}
	o, err := th.Client.Get(t.Context(), api.Gateways, "default", "a")
	if err != nil {
		t.Fatal(err)
	}
	if g := o.(*api.Gateway); len(g.Status.Members) != 2 || g.Status.State != api.PairActive {
		t.Errorf("%+v", g.Status)
	}
	var got harness.Answer
	harness.Eventually(t, patient, "the function reaches the server", func() bool {
		got = th.Get("inside.default.localhost", "/call?host=shop")
		return got.Status == 200
	})
	if a := shop.asked(); len(a) != 1 || a[0] != havipA {
		t.Errorf("the server was asked by %v", a)
	}
	// The control: the same function without the annotation.
	th.Apply(service("outside"))
	if a := th.Get("outside.default.localhost", "/call?host=shop"); a.Status != 502 || len(shop.asked()) != 1 {
		t.Errorf("without the annotation: %s; the server was asked by %v", a, shop.asked())
	}
	// The waterfall of a cold answer says how long it took to attach the instance; of one that is not attached, that it took nothing.
	for name, annotations := range map[string][]string{"later": {harness.InitialZero, "net.thaw.run/subnet: shop/a"}, "later-outside": {harness.InitialZero}} {
		th.Apply(service(name, annotations...))
		a := th.Get(name+".default.localhost", "/")
		net := phase(a.Header.Get("Server-Timing"), "net")
		if attached := len(annotations) == 2; a.Status != 200 || net < 0 || (net > 0) != attached || phase(a.Header.Get("Server-Timing"), "create") <= 0 {
			t.Errorf("%s, attached %v: %v, Server-Timing %q", name, attached, a, a.Header.Get("Server-Timing"))
		}
	}
	// In use; and gone without a trace.
	if code, _, stderr := th.Verb("", "subnet", "delete", "a"); code == 0 || !strings.Contains(stderr, "in use by revision inside-00001") {
		t.Errorf("%d %s", code, stderr)
	}
	if err := th.Stop(); err != nil {
		t.Error(err)
	}
	nothingIsLeft(t, th)
}
