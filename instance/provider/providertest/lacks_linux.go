package providertest

import (
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Lacks ends a test that has found no sandboxes here: it is skipped where the machine is to blame, and fails where it is not, so that
// a broken sandbox does not pass for a machine without: as root with the rights and the kernel that sandboxes need, and wherever
// CI is set.
func Lacks(t testing.TB, err error) {
	t.Helper()
	if os.Geteuid() == 0 && (os.Getenv("CI") != "" || suits()) {
		t.Fatalf("sandboxes ought to work here: %v", err)
	}
	t.Skip(err)
}

// suits says whether this is Linux 5.12 or later and nothing has taken away what root may do.
func suits() bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	release := strings.SplitN(unix.ByteSliceToString(u.Release[:]), ".", 3)
	if len(release) < 2 {
		return false
	}
	major, _ := strconv.Atoi(release[0])
	minor, _ := strconv.Atoi(release[1])
	if major < 5 || major == 5 && minor < 12 {
		return false
	}
	b, _ := os.ReadFile("/proc/self/status")
	for line := range strings.Lines(string(b)) {
		if v, ok := strings.CutPrefix(line, "CapEff:"); ok {
			have, _ := strconv.ParseUint(strings.TrimSpace(v), 16, 64)
			for _, c := range []int{unix.CAP_SYS_ADMIN, unix.CAP_SYS_PTRACE, unix.CAP_SETUID, unix.CAP_SETGID, unix.CAP_CHOWN, unix.CAP_SYS_CHROOT} {
				if have&(1<<c) == 0 {
					return false
				}
			}
			return true
		}
	}
	return false
}
