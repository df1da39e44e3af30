package cgroup

import (
	"log/slog"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"testing"
)

func TestOpenGroupStaysInItsTree(t *testing.T) {
	g := (*Trees)(nil).Open("x", []string{"/etc", "/sys/fs/cgroup/memory/user.slice", cgroupRoot + "/../../../tmp/thaw-x"})
	if len(g.Paths()) != 0 {
		t.Errorf("accepted %v", g.Paths())
	}
}

// TestCreateOverALeftover: who made a group and froze it was killed. The next one of that name is a new one; a child that is cloned into a
// frozen group hangs before its exec, and its parent with it.
func TestCreateOverALeftover(t *testing.T) {
	trees := New("cgrouptest"+strconv.Itoa(os.Getpid()), slog.New(slog.DiscardHandler))
	if !trees.Freezes() {
		t.Skip("no group can be frozen here")
	}
	defer trees.Close()
	run := func(g *Group, name string, args ...string) *exec.Cmd {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: g.CloneFD()}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		g.CloseFD()
		return cmd
	}
	old := trees.Create("measure")
	sleeps := run(old, "sleep", "300")
	defer func() { _ = sleeps.Process.Kill() }()
	if err := old.Freeze(t.Context(), true); err != nil {
		t.Fatal(err)
	}
	g := trees.Create("measure")
	if g.Frozen() {
		_ = old.Freeze(t.Context(), false)
		t.Fatal("the new group is frozen")
	}
	if err := sleeps.Wait(); err == nil {
		t.Error("the old group's process has ended by itself")
	}
	if err := run(g, "true").Wait(); err != nil {
		t.Error(err)
	}
	g.Remove()
	if found := trees.Find("measure"); len(found) != 0 {
		t.Errorf("left: %v", found)
	}
}
