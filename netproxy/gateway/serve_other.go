//go:build !linux

package gateway

import (
	"context"
	"errors"
)

// Serve needs Linux.
func Serve(context.Context, Options) error { return errors.New("gateways need Linux") }
