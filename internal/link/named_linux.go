package link

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Current opens the namespace of the calling thread.
func Current() (*Namespace, error) {
	h, err := netns.Get()
	if err != nil {
		return nil, fmt.Errorf("network namespace of this thread: %w", err)
	}
	return &Namespace{h}, nil
}

// Enter moves the calling thread into the namespace for good: its goroutine has to be locked to it, and must not unlock it.
func (n *Namespace) Enter() error {
	if err := netns.Set(n.h); err != nil {
		return fmt.Errorf("enter network namespace: %w", err)
	}
	return nil
}

// Named opens the namespace that is held at a path, or makes one and holds it there: it outlives the process, with all that is in it,
// until Unname. Below /run/netns it is one of iproute2's too. made: there was none. It needs CAP_SYS_ADMIN.
func Named(path string) (n *Namespace, made bool, err error) {
	if held(path) {
		h, err := netns.GetFromPath(path)
		if err != nil {
			return nil, false, fmt.Errorf("network namespace %s: %w", path, err)
		}
		return &Namespace{h}, false, nil
	}
	if n, err = NewNamespace(); err != nil {
		return nil, false, err
	}
	if err := hold(n, path); err != nil {
		n.Close()
		return nil, false, fmt.Errorf("network namespace %s: %w", path, err)
	}
	return n, true, nil
}

// hold puts a namespace where the path is. A plain file there is what a reboot left of an earlier one.
func hold(n *Namespace, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDONLY, 0o444)
	if err != nil {
		return err
	}
	f.Close()
	if err := unix.Mount(fmt.Sprintf("/proc/self/fd/%d", n.Fd()), path, "", unix.MS_BIND, ""); err != nil {
		return errors.Join(fmt.Errorf("hold: %w", err), os.Remove(path))
	}
	return nil
}

func held(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && int64(st.Type) == unix.NSFS_MAGIC
}

// Unname lets go of a namespace held at a path; none there is no error. It ends, with its devices, when nobody else has it open.
func Unname(path string) error {
	if held(path) {
		if err := unix.Unmount(path, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("let go of network namespace %s: %w", path, err)
		}
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
