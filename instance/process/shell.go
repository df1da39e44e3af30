package process

import (
	"syscall"

	"github.com/thawrun/thaw/instance/provider"
)

// forkExecShell starts the program through a shell that puts its own pid into LISTEN_PID and then becomes the program. An
// exec that fails shows as exit code 126 or 127 with the shell's message in the output.
func forkExecShell(s *provider.Spec, attr *syscall.ProcAttr) (int, error) {
	argv := append([]string{"sh", "-c", `LISTEN_PID=$$; export LISTEN_PID; exec "$@"`, "sh", s.Path}, s.Argv[1:]...)
	return syscall.ForkExec("/bin/sh", argv, attr)
}
