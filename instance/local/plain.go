package local

import (
	"context"
	"io"
	"log/slog"
	"net"
	"os"
	"strconv"

	"github.com/thawrun/thaw/instance/cgroup"
	"github.com/thawrun/thaw/instance/process"
	"github.com/thawrun/thaw/instance/provider"
)

// NewProcesses is the provider of plain processes; node names the data folder in the kernel's trees, dir has the instances'
// folders, path is PATH for their programs.
func NewProcesses(node, dir, path string, log *slog.Logger) (*Provider, error) {
	rt, err := process.New(node, log)
	if err != nil {
		return nil, err
	}
	return New(plain{rt, path}, dir, log), nil
}

// plain is the backend of plain processes.
type plain struct {
	*process.Runtime
	path string
}

func (b plain) Capabilities() provider.Capabilities {
	return provider.Capabilities{Name: "process", Isolation: b.Isolation(), Freezes: process.Freezes, LateLimits: b.Groups().Late(), Path: b.path}
}

// Prepare looks whether the program is there, as the kernel would at the first start.
func (b plain) Prepare(_ context.Context, s *provider.Spec) error {
	return CheckProgram(s.Path, b.path, os.Open)
}

func (b plain) Strays() bool { return true }

func (b plain) Place(id string) (Place, error) {
	return &plainPlace{b: b, group: b.Groups().Create(id)}, nil
}

func (b plain) Adopt(id string, i process.Identity) (*process.Process, Place, error) {
	proc, err := b.Runtime.Adopt(id, i)
	if err != nil {
		return nil, nil, err
	}
	return proc, &plainPlace{b: b, used: true}, nil
}

type plainPlace struct {
	b     plain
	group *cgroup.Group
	used  bool // the group belongs to the process
}

func (pl *plainPlace) Start(s *provider.Spec) (*process.Process, error) {
	p, err := pl.b.Runtime.Start(pl.group, s)
	pl.used = err == nil
	return p, err
}

// Grant has nothing to show: a process sees the machine's files.
func (pl *plainPlace) Grant(s *provider.Spec) error {
	pl.group.Limit(s.Limits)
	return nil
}

func (pl *plainPlace) Close() {
	if !pl.used {
		pl.group.Remove()
	}
}

func (pl *plainPlace) Dial(ctx context.Context, port int) (net.Conn, error) {
	return new(net.Dialer).DialContext(ctx, "tcp4", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
}

func (pl *plainPlace) Command(context.Context, *provider.Spec, io.Writer) error {
	return provider.ErrUnsupported
}
