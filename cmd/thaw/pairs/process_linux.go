package pairs

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// process is a node's, started by this process or by one before it.
type process struct {
	*os.Process
	ended chan struct{} // closed when it has
	err   error         // how, of a child; set before
}

// start starts a node in its namespace. It is no part of the caller's group, whose terminal may send signals.
func start(program string, n *node) (*process, error) {
	cmd := exec.Command(program, "gateway", "--config", n.file)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.ns.Do(cmd.Start); err != nil {
		return nil, err
	}
	p := &process{Process: cmd.Process, ended: make(chan struct{})}
	go func() {
		defer close(p.ended)
		p.err = cmd.Wait()
	}()
	return p, nil
}

// find returns the node that an earlier process started with a file; nil = there is none. The command line is what tells it: it is
// there without a file that a crash could leave wrong.
func find(file string) *process {
	entries, _ := os.ReadDir("/proc")
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || !runs(pid, file) {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		found, err := os.FindProcess(pid)
		if err != nil || !runs(pid, file) { // the number is another's by now
			unix.Close(fd)
			continue
		}
		p := &process{Process: found, ended: make(chan struct{})}
		go func() {
			defer close(p.ended)
			defer unix.Close(fd)
			for {
				if _, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1); !errors.Is(err, unix.EINTR) {
					return
				}
			}
		}()
		return p
	}
	return nil
}

// runs says whether a process of this file system is the node with a file.
func runs(pid int, file string) bool {
	proc := "/proc/" + strconv.Itoa(pid)
	line, err := os.ReadFile(proc + "/cmdline")
	if err != nil || !bytes.HasSuffix(line, []byte("\x00gateway\x00--config\x00"+file+"\x00")) {
		return false
	}
	ours, err1 := os.Stat("/")
	its, err2 := os.Stat(proc + "/root")
	return err1 == nil && err2 == nil && os.SameFile(ours, its)
}

// attend returns when the process has ended; it is told to when ctx ends.
func (p *process) attend(ctx context.Context) error {
	select {
	case <-p.ended:
		return p.err
	case <-ctx.Done():
	}
	_ = p.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
	case <-time.After(farewell):
		_ = p.Kill()
		<-p.ended
	}
	return p.err
}
