package dev

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/thawrun/thaw/autoscaler"
)

// maxLearnt bounds what is read of the file: some hundred bytes for each of a million functions.
const maxLearnt = 1 << 30

// keepLearnt is the file "learnt" in the data folder: what the autoscaler's planner knows of functions. It is a convenience: without it,
// or when it is damaged, everything is learnt again.
func keepLearnt(dir string, log *slog.Logger) *autoscaler.Keep {
	file := filepath.Join(dir, "learnt")
	k := &autoscaler.Keep{Save: func(_ int, b []byte) {
		// Written beside and renamed: a crash leaves the old one. No fsync; what is lost with the machine's power is learnt again.
		err := os.WriteFile(file+".new", b, 0o600)
		if err == nil {
			err = os.Rename(file+".new", file)
		}
		if err != nil {
			log.Warn("what the autoscaler has learnt is not kept", "error", err)
		}
	}}
	info, err := os.Stat(file)
	if err == nil && info.Size() <= maxLearnt {
		k.Learnt, err = os.ReadFile(file)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		log.Warn("what the autoscaler has learnt before cannot be read", "error", err)
	}
	return k
}
