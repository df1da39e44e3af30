package gateway

import (
	"io"
	"log/slog"
)

// Options are what Serve needs besides the configuration.
type Options struct {
	Load  func() (Config, error) // reads the configuration: at first, and on each Reload
	Again <-chan struct{}        // says that the configuration has changed
	Ready func(pairs int)        // called once, when all pairs are there
	// Measure is called once, before the node does anything, with what tells its state. May be nil.
	Measure func(status func() (Status, error))
	Log     *slog.Logger
	Out     io.Writer // a line for each change of role
}
