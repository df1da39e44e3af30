//go:build !linux

package process

import (
	"context"

	"github.com/thawrun/thaw/instance/provider"
)

// Freezes says whether processes can be stopped where they stand.
const Freezes = false

func (p *Process) Freeze(context.Context, bool) error { return provider.ErrUnsupported }

// Frozen is never so here.
func (p *Process) Frozen() bool { return false }
