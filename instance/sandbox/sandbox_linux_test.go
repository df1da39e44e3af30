//go:build amd64 || arm64

package sandbox

import (
	"errors"
	"log/slog"
	"os"
	"strconv"
	"testing"

	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/provider"
	"github.com/thawrun/thaw/instance/provider/providertest"
)

func open(dir string) (*local.Provider, error) {
	return New(Config{
		Node: "sandboxtest" + strconv.Itoa(os.Getpid()), Dir: dir, Path: os.Getenv("PATH"), Log: slog.New(slog.DiscardHandler),
	})
}

func newRig(t testing.TB) *providertest.Rig {
	t.Helper()
	dir := t.TempDir()
	r := &providertest.Rig{Dir: dir, Note: local.NoteFile}
	r.Reopen = func() (provider.Provider, *providertest.Events, error) {
		if r.Provider != nil {
			r.Provider.Close()
		}
		p, err := open(dir)
		if err != nil {
			return nil, nil, err
		}
		e := &providertest.Events{}
		p.Watch(e.Add)
		return p, e, nil
	}
	var err error
	r.Provider, r.Events, err = r.Reopen()
	if errors.Is(err, provider.ErrUnsupported) {
		providertest.Lacks(t, err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Provider.Close() })
	return r
}

func TestContract(t *testing.T) {
	for _, c := range providertest.Checks {
		t.Run(c.Name, func(t *testing.T) {
			if err := c.Run(t.Context(), newRig(t)); err != nil {
				t.Error(err)
			}
		})
	}
}
