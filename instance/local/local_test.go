package local

import (
	"log/slog"
	"os"
	"strconv"
	"testing"

	"github.com/thawrun/thaw/instance/provider"
	"github.com/thawrun/thaw/instance/provider/providertest"
)

func rig(t *testing.T, open func(dir string) (*Provider, error)) *providertest.Rig {
	t.Helper()
	dir := t.TempDir()
	r := &providertest.Rig{Dir: dir, Note: NoteFile}
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
	if r.Provider, r.Events, err = r.Reopen(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { r.Provider.Close() })
	return r
}

func TestProcesses(t *testing.T) {
	open := func(dir string) (*Provider, error) {
		return NewProcesses("contract"+strconv.Itoa(os.Getpid()), dir, "/usr/bin:/bin", slog.New(slog.DiscardHandler))
	}
	for _, c := range providertest.Checks {
		t.Run(c.Name, func(t *testing.T) {
			if err := c.Run(t.Context(), rig(t, open)); err != nil {
				t.Error(err)
			}
		})
	}
}
