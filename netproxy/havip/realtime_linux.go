package havip

import (
	"fmt"
	"os"
	"runtime"
	"runtime/debug"
	"strconv"

	"golang.org/x/sys/unix"
)

// Priorities of SCHED_FIFO: adverts come first, then the addresses, then the replication, then all other threads of the process, which
// one of the others may have to wait for (garbage collection), and at last everything ordinary.
const (
	advertPriority  = 20
	keeperPriority  = 15
	syncPriority    = 10
	processPriority = 5
)

// realtime puts the calling thread, which has to be locked to its goroutine, before all ordinary ones. An advert that is late by three
// intervals is a failover, and ordinary threads on a busy machine are.
func realtime(priority uint32) error { return setRealtime(0, priority) }

func setRealtime(thread int, priority uint32) error {
	err := unix.SchedSetAttr(thread, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_FIFO, Priority: priority}, 0)
	if err != nil {
		return fmt.Errorf("real-time priority %d: %w", priority, err)
	}
	return nil
}

// prepareProcess gives all threads of the process, and so those that it will make, a low real-time priority, keeps its memory from
// being paged out, and its heap small enough to be collected quickly. It says what was refused.
func prepareProcess() (refused []error) {
	// A thread that comes back from a system call needs a processor of Go's scheduler; there shall always be one.
	runtime.GOMAXPROCS(max(8, runtime.NumCPU()))
	debug.SetGCPercent(200)
	tasks, err := os.ReadDir("/proc/self/task")
	for _, t := range tasks {
		id, _ := strconv.Atoi(t.Name())
		if e := setRealtime(id, processPriority); e != nil && e != unix.ESRCH && err == nil {
			err = e
		}
	}
	if err != nil {
		refused = append(refused, err)
	}
	// ONFAULT: the address space that Go's runtime only reserves stays free.
	if err := unix.Mlockall(unix.MCL_CURRENT | unix.MCL_FUTURE | unix.MCL_ONFAULT); err != nil {
		refused = append(refused, fmt.Errorf("lock memory: %w", err))
	}
	return refused
}
