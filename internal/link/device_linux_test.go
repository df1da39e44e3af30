package link

import (
	"testing"

	"github.com/vishvananda/netlink"
)

// A list that changes came between is asked for again.
func TestWhole(t *testing.T) {
	n := 0
	all, err := whole(func() ([]int, error) {
		if n++; n < 3 {
			return []int{n}, netlink.ErrDumpInterrupted
		}
		return []int{1, 2}, nil
	})
	if err != nil || len(all) != 2 || n != 3 {
		t.Errorf("%v %v after %d", all, err, n)
	}
	if _, err := whole(func() ([]int, error) { return nil, netlink.ErrDumpInterrupted }); err == nil {
		t.Error("a list that is never whole was given out")
	}
}
