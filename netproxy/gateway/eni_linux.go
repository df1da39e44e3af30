package gateway

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/thawrun/thaw/internal/link"
)

// ENI is a NIC in a tenant's network that one half of a pair has.
type ENI struct {
	ID      uint32 // of the pair
	Network Network
	In      *link.Namespace // where it is to be, as the device eniDevice
}

// eniDevice is what an ENI is called in its namespace.
const eniDevice = "eni"

// ENIProvider makes NICs in tenants' networks: on a bridge or a card of the node, or by a cloud's API. It is called when a pair is made or
// removed, never for an instance. One call at a time for one ENI.
type ENIProvider interface {
	// Ensure makes an ENI, or finds the one that is there, and puts it into its namespace, switched off. It may be repeated after
	// an error or a restart.
	Ensure(ctx context.Context, e ENI) error
	// Delete takes an ENI away; one that is not there is no error.
	Delete(ctx context.Context, e ENI) error
	// List returns the pairs that have an ENI on this node.
	List(ctx context.Context) ([]uint32, error)
}

// Bridges provides cables into bridges of a node's namespace.
type Bridges struct{ Host *link.Namespace }

// port is the bridge's end of a cable.
const portPrefix = "gwe"

func port(id uint32) string { return portPrefix + strconv.FormatUint(uint64(id), 10) }

// Ensure lays a cable, or finds it.
func (b Bridges) Ensure(_ context.Context, e ENI) error {
	c, err := b.Host.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Device(e.Network.Bridge); err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	there, err := has(e.In, eniDevice)
	if err != nil {
		return err
	}
	if !there {
		// An end whose namespace has just gone may be there for a moment yet.
		if err := c.DeleteDevice(port(e.ID)); err != nil {
			return err
		}
		if err := link.Cable(link.End{In: b.Host, Name: port(e.ID)}, link.End{In: e.In, Name: eniDevice}); err != nil {
			return err
		}
	}
	if err := c.Enslave(port(e.ID), e.Network.Bridge); err != nil {
		return err
	}
	if there { // somebody else may have pulled it: that is a lost link, and not for us to mend
		return nil
	}
	return c.SetUp(port(e.ID), true)
}

// Delete takes the cable out, with both ends.
func (b Bridges) Delete(_ context.Context, e ENI) error {
	return remove(b.Host, port(e.ID))
}

// List looks at the devices.
func (b Bridges) List(context.Context) ([]uint32, error) {
	c, err := b.Host.Open()
	if err != nil {
		return nil, err
	}
	defer c.Close()
	names, err := c.Devices(portPrefix)
	return ids(names, portPrefix), err
}

// NICs provides VLANs and macvlans of network cards of a node's namespace.
type NICs struct {
	Host       *link.Namespace
	Namespaces string // folder that holds the tenants'
}

// Ensure makes the device, or finds it.
func (n NICs) Ensure(_ context.Context, e ENI) error {
	if there, err := has(e.In, eniDevice); err != nil || there {
		return err
	}
	c, err := n.Host.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	to := link.End{In: e.In, Name: eniDevice}
	if e.Network.Shared {
		return c.AddMACVLAN(e.Network.Device, to)
	}
	return c.AddVLAN(e.Network.Device, e.Network.VLAN, to)
}

// Delete takes the device away.
func (n NICs) Delete(_ context.Context, e ENI) error { return remove(e.In, eniDevice) }

// List looks into the tenants' namespaces.
func (n NICs) List(context.Context) ([]uint32, error) {
	held, err := namespaces(n.Namespaces)
	if err != nil {
		return nil, err
	}
	var list []uint32
	for _, id := range held {
		ns, _, err := link.Named(namespacePath(n.Namespaces, id))
		if err != nil {
			return nil, err
		}
		there, err := has(ns, eniDevice)
		ns.Close()
		if err != nil {
			return nil, err
		}
		if there {
			list = append(list, id)
		}
	}
	return list, nil
}

func has(in *link.Namespace, device string) (bool, error) {
	c, err := in.Open()
	if err != nil {
		return false, err
	}
	defer c.Close()
	_, err = c.Device(device)
	if errors.Is(err, link.ErrNoDevice) {
		return false, nil
	}
	return err == nil, err
}

func remove(in *link.Namespace, device string) error {
	c, err := in.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	return c.DeleteDevice(device)
}

// namespacePrefix begins the names of tenants' namespaces.
const namespacePrefix = "thaw-pair-"

func namespacePath(dir string, id uint32) string {
	return filepath.Join(dir, namespacePrefix+strconv.FormatUint(uint64(id), 10))
}

// namespaces returns the pairs whose namespaces a folder holds.
func namespaces(dir string) ([]uint32, error) {
	list, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	var names []string
	for _, e := range list {
		names = append(names, e.Name())
	}
	return ids(names, namespacePrefix), err
}

// ids reads the numbers after a prefix; other names are somebody else's.
func ids(names []string, prefix string) []uint32 {
	var list []uint32
	for _, name := range names {
		rest, ours := strings.CutPrefix(name, prefix)
		if id, err := strconv.ParseUint(rest, 10, 32); ours && err == nil && id > 0 {
			list = append(list, uint32(id))
		}
	}
	return list
}

// localENIs provides what a Network names.
type localENIs struct {
	bridges Bridges
	nics    NICs
}

// LocalENIs is the provider of a node on its own: Bridges and NICs.
func LocalENIs(host *link.Namespace, namespaces string) ENIProvider {
	return localENIs{Bridges{host}, NICs{host, namespaces}}
}

func (l localENIs) of(n Network) ENIProvider {
	if n.Bridge != "" {
		return l.bridges
	}
	return l.nics
}

func (l localENIs) Ensure(ctx context.Context, e ENI) error { return l.of(e.Network).Ensure(ctx, e) }
func (l localENIs) Delete(ctx context.Context, e ENI) error { return l.of(e.Network).Delete(ctx, e) }
func (l localENIs) List(ctx context.Context) ([]uint32, error) {
	return l.nics.List(ctx) // the cables into bridges end in the same namespaces
}

// MeteredENIs counts the calls of a provider, and delays them as a cloud would.
type MeteredENIs struct {
	ENIProvider
	Delay time.Duration
	calls atomic.Uint64
}

// Calls is how many calls there were, List included.
func (m *MeteredENIs) Calls() uint64 { return m.calls.Load() }

func (m *MeteredENIs) wait(ctx context.Context) error {
	m.calls.Add(1)
	if m.Delay == 0 {
		return nil
	}
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(m.Delay):
		return nil
	}
}

// Ensure counts, waits, and passes on.
func (m *MeteredENIs) Ensure(ctx context.Context, e ENI) error {
	if err := m.wait(ctx); err != nil {
		return err
	}
	return m.ENIProvider.Ensure(ctx, e)
}

// Delete counts, waits, and passes on.
func (m *MeteredENIs) Delete(ctx context.Context, e ENI) error {
	if err := m.wait(ctx); err != nil {
		return err
	}
	return m.ENIProvider.Delete(ctx, e)
}

// List counts and passes on.
func (m *MeteredENIs) List(ctx context.Context) ([]uint32, error) {
	m.calls.Add(1)
	return m.ENIProvider.List(ctx)
}
