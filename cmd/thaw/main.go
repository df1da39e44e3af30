// Command thaw is Thaw: the server (`thaw dev`), a demonstration (`thaw demo`), and the verbs that people use. Every verb
// and flag stands in docs/cli.md.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/KimMachineGun/automemlimit/memlimit"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
)

// version is stamped by the linker (see the Makefile).
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	limitMemory(memlimit.FromCgroup)
	env := verbs.System(version)
	os.Exit(verbs.Main(ctx, newRootCommand(env), env))
}
