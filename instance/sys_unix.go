//go:build unix

package instance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// ErrLocked says that another agent works in the data folder.
var ErrLocked = errors.New("another thaw is using this data folder")

// lockDir takes the data folder for this process; the kernel gives it back when the process ends, however it ends.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "agent.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("instance: %w", err)
	}
	for deadline := time.Now().Add(lockPatience); ; time.Sleep(5 * time.Millisecond) {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case err == nil:
			return f, nil
		case errors.Is(err, syscall.EINTR):
			continue
		case !errors.Is(err, syscall.EWOULDBLOCK):
			f.Close()
			return nil, fmt.Errorf("instance: lock %s: %w", dir, err)
		case time.Now().After(deadline):
			f.Close()
			return nil, fmt.Errorf("instance: %s: %w", dir, ErrLocked)
		}
	}
}

// lockPatience is how long the lock of an agent that was killed is waited for. Children that it had forked and that had not
// come to their exec yet still hold it, for some milliseconds; so whoever gets the lock also knows that every process of its
// predecessor carries its marker by now.
const lockPatience = time.Second

// dup returns another descriptor of f under a new name, in blocking mode as programs expect of a socket that they are
// given.
func dup(f *os.File, name string) (*os.File, error) {
	fd := f.Fd() // makes the socket blocking, for all its descriptors
	syscall.ForkLock.RLock()
	n, err := syscall.Dup(int(fd))
	if err == nil {
		syscall.CloseOnExec(n)
	}
	syscall.ForkLock.RUnlock()
	if err != nil {
		return nil, fmt.Errorf("instance: dup: %w", err)
	}
	return os.NewFile(uintptr(n), name), nil
}
