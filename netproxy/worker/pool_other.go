//go:build !linux

package worker

import (
	"context"
	"fmt"
	"os"

	"github.com/thawrun/thaw/netproxy/tunnel"
)

// Pool keeps slots.
type Pool struct{}

// Open makes a pool.
func Open(cfg Config) (*Pool, error) {
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("slots need Linux: %w", tunnel.ErrUnsupported)
}

// Run keeps slots ready until ctx ends.
func (*Pool) Run(context.Context) error { return tunnel.ErrUnsupported }

// SetSubnets says which subnets there are.
func (*Pool) SetSubnets([]Subnet) error { return tunnel.ErrUnsupported }

// Attach returns the namespace of a slot in a subnet.
func (*Pool) Attach(_, _ string) (*os.File, error) { return nil, tunnel.ErrUnsupported }

// Stats counts.
func (*Pool) Stats() Stats { return Stats{} }

// Close lets go of the slots that wait.
func (*Pool) Close() error { return nil }
