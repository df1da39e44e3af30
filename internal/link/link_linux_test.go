package link_test

import (
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/internal/link/linktest"
)

func TestMain(m *testing.M) { os.Exit(linktest.Main(m)) }

func TestAddressLease(t *testing.T) {
	ns := linktest.New(t)
	c := linktest.Open(t, ns)
	lo, err := c.Device("lo")
	if err != nil {
		t.Fatal(err)
	}
	kept, leased := netip.MustParsePrefix("192.0.2.1/32"), netip.MustParsePrefix("192.0.2.2/32")
	if err := errors.Join(c.SetAddress(lo.Index, kept, 0), c.SetAddress(lo.Index, leased, time.Second)); err != nil {
		t.Fatal(err)
	}
	has := func(p netip.Prefix) bool {
		list, err := c.Addresses(lo.Index)
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(list, p)
	}
	if !has(kept) || !has(leased) {
		t.Fatal("the addresses are not there")
	}
	for deadline := time.Now().Add(4 * time.Second); has(leased); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the lease is over, but the address is still there")
		}
	}
	if !has(kept) {
		t.Error("the address without a lease went too")
	}
	if err := errors.Join(c.DeleteAddress(lo.Index, kept), c.DeleteAddress(lo.Index, kept)); err != nil {
		t.Errorf("deleting twice: %v", err)
	}
	if has(kept) {
		t.Error("deleted address is still there")
	}
}

func TestWatchSeesACarrierGo(t *testing.T) {
	ns, s := linktest.New(t), linktest.NewSwitch(t)
	port := s.Plug(t, ns, "eth0", "192.0.2.1/24")
	c := linktest.Open(t, ns)
	var fd int
	if err := ns.Do(func() (err error) { fd, err = link.Watch(); return err }); err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if d, err := c.Device("eth0"); err != nil || !d.Up || d.MTU != 1500 || d.MAC == [6]byte{} {
		t.Fatalf("%+v, %v", d, err)
	}
	port.Cable(false)
	if n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 5000); n != 1 {
		t.Fatalf("no notice of a lost carrier: %v", err)
	}
	d, err := c.Device("eth0")
	if err != nil {
		t.Fatal(err)
	}
	up, buf := true, make([]byte, 32<<10)
	for deadline := time.Now().Add(5 * time.Second); up; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the device is up without a carrier")
		}
		link.ReadWatch(fd, buf, func(index int, is bool) {
			if index == d.Index {
				up = is
			}
		})
	}
	if d, err := c.Device("eth0"); err != nil || d.Up {
		t.Errorf("%+v, %v", d, err)
	}
	if _, err := c.Device("eth9"); !errors.Is(err, link.ErrNoDevice) {
		t.Errorf("device that does not exist: %v", err)
	}
}
