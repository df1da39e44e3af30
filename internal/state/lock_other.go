//go:build !unix

package state

import (
	"fmt"
	"os"
)

// lockDir needs flock, which this system lacks.
func lockDir(dir string) (*os.File, error) {
	return nil, fmt.Errorf("%w: %s: an embedded server is not supported on this system; use endpoints", ErrDataDir, dir)
}
