package cgroup

import "testing"

func TestOpenGroupStaysInItsTree(t *testing.T) {
	g := (*Trees)(nil).Open("x", []string{"/etc", "/sys/fs/cgroup/memory/user.slice", cgroupRoot + "/../../../tmp/thaw-x"})
	if len(g.Paths()) != 0 {
		t.Errorf("accepted %v", g.Paths())
	}
}
