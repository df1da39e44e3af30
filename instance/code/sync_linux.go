package code

import (
	"os"

	"golang.org/x/sys/unix"
)

// syncTree writes out the file system that dir is on: one call for thousands of files.
func syncTree(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return unix.Syncfs(int(f.Fd()))
}
