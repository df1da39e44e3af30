package harness

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// clocksEnv names the folder in which programs that were built with SettableClock look for their clocks.
const clocksEnv = "THAW_TEST_CLOCKS"

// SettableClock makes a program's wall clock one that Clocks.Set moves while it runs, and leaves the monotonic one as it is: what happens to a
// machine whose time is put right. The kernel has one wall clock for all, which tests must not touch.
func SettableClock() ([]Change, error) {
	out, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return nil, fmt.Errorf("go env: %w", err)
	}
	file := filepath.Join(strings.TrimSpace(string(out)), "src", "time", "time.go")
	return []Change{
		{file, "import (\n\t\"errors\"\n", "import (\n\t\"errors\"\n\t\"sync/atomic\"\n\t\"syscall\"\n"},
		{file, "func Now() Time {\n\tsec, nsec, mono := runtimeNow()\n", `
var testClock atomic.Int64

// The clock is read in places where nothing can be read from a file. So that is done here, every ten milliseconds.
func init() {
	dir, ok := syscall.Getenv("` + clocksEnv + `")
	if !ok {
		return
	}
	file := string(appendInt([]byte(dir+"/"), syscall.Getpid(), 0))
	go func() {
		for ; ; Sleep(10 * Millisecond) {
			fd, err := open(file)
			if err != nil {
				continue
			}
			var b [32]byte
			n, _ := read(fd, b[:])
			closefd(fd)
			if v, err := atoi(b[:max(n, 0)]); err == nil {
				testClock.Store(int64(v))
			}
		}
	}()
}

func Now() Time {
	sec, nsec, mono := runtimeNow()
	sec += testClock.Load()
`},
	}, nil
}

// Clocks are the clocks of processes that were built with SettableClock and are started after NewClocks.
type Clocks struct{ dir string }

// NewClocks makes all clocks right.
func NewClocks(t *testing.T) Clocks {
	t.Helper()
	dir := t.TempDir()
	t.Setenv(clocksEnv, dir)
	return Clocks{dir}
}

// Set makes a process's clock wrong by so many seconds from the next hundredth of a second on.
func (c Clocks) Set(p *Process, seconds int) error {
	file := filepath.Join(c.dir, fmt.Sprint(p.PID()))
	if err := os.WriteFile(file+".new", []byte(fmt.Sprint(seconds)), 0o600); err != nil {
		return err
	}
	return os.Rename(file+".new", file)
}
