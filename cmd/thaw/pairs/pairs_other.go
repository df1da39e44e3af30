//go:build !linux

package pairs

import (
	"context"
	"errors"
	"os"

	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/control/reconcile"
)

var errLinux = errors.New("networks of tenants need Linux")

// LastFirst is of no use here.
const LastFirst = 40_000

// Machine is not to be had here.
type Machine struct{}

// New returns what cannot be opened.
func New(Config) *Machine { return &Machine{} }

// Sweep has nothing to do.
func Sweep(Config) {}

// Open says so.
func (*Machine) Open() error { return errLinux }

// Attach is instance.Networks'.
func (*Machine) Attach(string, string) (*os.File, error) { return nil, errLinux }

// Run ends at once.
func (*Machine) Run(context.Context, *objects.Store) error { return errLinux }

// Close has nothing to do.
func (*Machine) Close() {}

// EnsurePair is reconcile.Network's.
func (*Machine) EnsurePair(context.Context, reconcile.Pair) (reconcile.PairStatus, error) {
	return reconcile.PairStatus{}, errLinux
}

// RemovePair is reconcile.Network's.
func (*Machine) RemovePair(context.Context, reconcile.Pair) error { return errLinux }

// Pairs is reconcile.Network's.
func (*Machine) Pairs(context.Context) ([]reconcile.Pair, error) { return nil, errLinux }
