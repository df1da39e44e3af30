// Package e2e tests the whole system as people use it: the real `thaw` binary as a process with its embedded etcd on disk, real
// functions as processes, real clients over loopback.
package e2e

import (
	"os"
	"testing"

	"github.com/thawrun/thaw/test/harness"
)

// bin is the folder with the binaries under test, built once.
var bin string

func TestMain(m *testing.M) {
	os.Exit(harness.Main(m, &bin, "cmd/thaw", "cmd/queueproxy", "examples/checker", "examples/crasher", "test/function"))
}
