//go:build unix

package instance

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// ErrLocked says that another agent works in the data folder.
var ErrLocked = errors.New("another thaw is using this data folder")

// lockDir takes the data folder for this process; the kernel gives it back when the process ends, however it ends.
func lockDir(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, "agent.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("instance: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("instance: %s: %w", dir, ErrLocked)
		}
		return nil, fmt.Errorf("instance: lock %s: %w", dir, err)
	}
	return f, nil
}

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
