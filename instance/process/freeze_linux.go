package process

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/thawrun/thaw/instance/provider"
)

// Freezes says whether processes can be stopped where they stand.
const Freezes = true

// Freeze stops an instance where it stands, or lets it go on: by its control group, and where there is none that can do so, by SIGSTOP
// to its process group. Then whoever has left that group goes on, and so does nobody else.
func (p *Process) Freeze(ctx context.Context, frozen bool) error {
	err := p.group.Freeze(ctx, frozen)
	if !errors.Is(err, provider.ErrUnsupported) {
		return err
	}
	if !frozen {
		p.send(syscall.SIGCONT)
		return nil
	}
	p.send(syscall.SIGSTOP)
	again := time.NewTicker(stopAgain)
	defer again.Stop()
	for wait := 50 * time.Microsecond; !p.stopped(); wait = min(2*wait, 5*time.Millisecond) {
		select {
		case <-p.done:
			return fmt.Errorf("freeze: %w", ErrGone)
		case <-ctx.Done():
			return fmt.Errorf("freeze: %w", ctx.Err())
		case <-again.C:
			p.send(syscall.SIGCONT)
			p.send(syscall.SIGSTOP)
		case <-time.After(wait):
		}
	}
	return nil
}

// stopAgain is after how long one that has not stopped is let go on for a moment and stopped again: who waits for the exec of a child (vfork), as
// shells do, stops only then, and the child was stopped before.
const stopAgain = 20 * time.Millisecond

// Frozen says whether Freeze has stopped it, also for a predecessor.
func (p *Process) Frozen() bool { return p.group.Frozen() || p.stopped() }

func (p *Process) stopped() bool {
	st, err := readStat(p.id.PID)
	return err == nil && st.state == 'T'
}
