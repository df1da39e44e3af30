//go:build !linux

package havip

import (
	"context"
	"errors"
)

// Run needs Linux.
func Run(context.Context, Config) error { return errors.New("high-availability addresses need Linux") }
