//go:build !linux || !(amd64 || arm64)

// Package sandbox runs instances in sandboxes of a Linux kernel. There are none on this system.
package sandbox

import (
	"fmt"
	"log/slog"

	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/provider"
)

// Config is what sandboxes need to know.
type Config struct {
	Node, Dir, Path string
	Share           []string
	Log             *slog.Logger
	MaxPIDs         int64
}

// New says that there are no sandboxes here.
func New(Config) (*local.Provider, error) {
	return nil, fmt.Errorf("sandboxes need Linux on amd64 or arm64: %w", provider.ErrUnsupported)
}

// MaxSandboxes is how many there can be.
const MaxSandboxes = 0
