package instance

import (
	"os"

	"github.com/thawrun/thaw/instance/process"
)

// provider is what the agent asks of a way to run instances. There is one today, plain processes; sandboxes and pools
// come in behind it, which is why the agent itself knows no system call.
type provider interface {
	Start(*process.Spec) (running, error)
	Adopt(id string, p process.Identity) (running, error) // process.ErrGone when there is nothing to adopt
	Sweep(keep func(id string) bool)                      // kills and removes what instances left in the kernel that are not to be kept
	Marked() (map[string][]process.Identity, error)       // living processes by instance id
	KillStray(process.Identity)                           // ends one of them
	Isolation() string                                    // one line for people
	Close()
}

// running is one started instance.
type running interface {
	Identity() process.Identity
	Done() <-chan struct{} // closed when it and its whole process group have ended
	Exit() process.Exit    // once Done is closed
	Terminate()
	Kill()
	Listener(addr string) *os.File // a copy of the listening socket it was given; nil = cannot be had
}

// processes makes a process.Runtime a provider.
type processes struct{ *process.Runtime }

func (p processes) Start(s *process.Spec) (running, error) {
	proc, err := p.Runtime.Start(s)
	if err != nil {
		return nil, err // not a nil *Process in a non-nil interface
	}
	return proc, nil
}

func (p processes) Adopt(id string, i process.Identity) (running, error) {
	proc, err := p.Runtime.Adopt(id, i)
	if err != nil {
		return nil, err
	}
	return proc, nil
}
