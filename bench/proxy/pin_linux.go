package main

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"
)

// isolate gives cmd a network namespace if this process may make one: a packet filter of the machine's would be measured too,
// and ports be taken by others.
func isolate(cmd *exec.Cmd) {
	if os.Geteuid() == 0 {
		cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
		cmd.Env = append(cmd.Env, "BENCH_NETNS=1")
	}
}

// loopbackUp sets the one device of a new namespace up.
func loopbackUp() error {
	s, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(s)
	req, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	req.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(s, unix.SIOCSIFFLAGS, req)
}

// pinSelf moves every thread of this process to the first processor that it may use; threads that are still to come inherit it. It says what holds.
func pinSelf() string {
	where := "the machine's network"
	if os.Getenv("BENCH_NETNS") != "" {
		check(loopbackUp())
		where = "a network namespace of its own"
	}
	cpus := processors()
	if len(cpus) < 2 {
		return "one processor for all, " + where
	}
	tasks, err := os.ReadDir("/proc/self/task")
	check(err)
	for _, t := range tasks {
		tid, _ := strconv.Atoi(t.Name())
		pin(tid, cpus[0])
	}
	runtime.GOMAXPROCS(1)
	proxyCPU = cpus[len(cpus)-1]
	return fmt.Sprintf("client and function on processor %d, all hops of a peer on processor %d, %s", cpus[0], proxyCPU, where)
}

// proxyCPU is where the peers run; -1 = wherever the kernel puts them.
var proxyCPU = -1

func processors() (cpus []int) {
	var set unix.CPUSet
	if unix.SchedGetaffinity(0, &set) != nil {
		return nil
	}
	for i := range len(set) * 64 {
		if set.IsSet(i) {
			cpus = append(cpus, i)
		}
	}
	return cpus
}

func pin(tid, cpu int) {
	var set unix.CPUSet
	set.Set(cpu)
	_ = unix.SchedSetaffinity(tid, &set) // a thread may have ended
}

// startPinned starts cmd on the peers' processor: a child inherits what the thread has that starts it.
func startPinned(cmd *exec.Cmd) error {
	if proxyCPU < 0 {
		return cmd.Start()
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	own := processors()
	pin(0, proxyCPU)
	defer pin(0, own[0])
	return cmd.Start()
}
