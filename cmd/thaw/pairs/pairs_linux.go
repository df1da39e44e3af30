package pairs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/cmd/thaw/slots"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/control/reconcile"
	"github.com/thawrun/thaw/internal/link"
	"github.com/thawrun/thaw/netproxy/gateway"
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// The network between the namespaces. Nothing of it is to be seen outside of them.
const (
	under, sync0 = "under", "sync"
	prefix       = "100.64.0.0/16" // of the instances
	underMTU     = 1500
)

var (
	outers     = outerAddrs() // tunnels lead there, those of a subnet's first pair to the first; they move between the nodes
	workerAddr = netip.MustParseAddr("192.0.2.11")
	syncAddr   = [2]netip.Addr{netip.MustParseAddr("198.51.100.1"), netip.MustParseAddr("198.51.100.2")}
)

// maxPairs is how many pairs a subnet may have.
const maxPairs = 8

func outerAddrs() (list [maxPairs]netip.Addr) {
	list[0] = netip.MustParseAddr("192.0.2.1")
	for i := 1; i < maxPairs; i++ {
		list[i] = netip.AddrFrom4([4]byte{192, 0, 2, byte(100 + i)})
	}
	return list
}

// Times of a node.
const (
	advert    = 100 * time.Millisecond // a node shares the machine with functions: sooner than that it could be late without need
	made      = 5 * time.Second        // how long a pair is waited for before it is said to be in the making
	poll      = 20 * time.Millisecond
	farewell  = 5 * time.Second // to take pairs away at the end
	askForOne = time.Second
)

// Machine has all pairs. Make it with New.
type Machine struct {
	cfg                    Config
	host, worker, switches *link.Namespace
	nodes                  [2]*node
	slots                  *slots.Node
	adopted                bool // what an earlier process left is at work
	ran, closed            bool

	mu     sync.Mutex
	pairs  map[uint32]gateway.Pair
	whole  map[uint32]bool   // of these both halves have been there
	groups map[uint32]*group // by the ID of their first pair
}

// node is one of the two.
type node struct {
	name   string
	ns     *link.Namespace
	dir    string // of its tenants' namespaces
	cfg    gateway.Config
	file   string   // of cfg
	former *process // of an earlier Machine, nil = none

	process *os.Process // the one that is told of changes; guarded by Machine.mu
}

// New does nothing yet: Open does, once the folder is known to be nobody else's.
func New(cfg Config) *Machine {
	m := &Machine{cfg: cfg, pairs: map[uint32]gateway.Pair{}, whole: map[uint32]bool{}, groups: map[uint32]*group{}}
	for i, name := range []string{"a", "b"} {
		m.nodes[i] = &node{name: name, dir: filepath.Join(cfg.Dir, name), file: m.file(name)}
	}
	return m
}

// Open makes the namespaces and what connects them, or adopts them: they, the nodes' processes and the tunnels outlive a process that is killed, and
// so do the connections of its functions. What a predecessor left that is not whole, or that is laid out in another way, is taken away.
func (m *Machine) Open() (err error) {
	defer func() {
		if err != nil {
			m.Close()
			err = fmt.Errorf("networks of tenants: %w", err)
		}
	}()
	if m.host, err = link.Current(); err != nil {
		return err
	}
	if err := os.MkdirAll(m.cfg.Dir, 0o700); err != nil {
		return err
	}
	whole, err := m.enter()
	if err != nil {
		return err
	}
	if m.adopted = whole && m.recognize(); !m.adopted {
		m.leave()
		m.sweep()
		clear(m.pairs)
		clear(m.whole)
		for _, n := range m.nodes {
			n.former, n.process = nil, nil
		}
		if _, err := m.enter(); err != nil {
			return err
		}
		if err := m.wire(); err != nil {
			return err
		}
	}
	return m.worker.Do(func() (err error) {
		m.slots, err = slots.Open(slots.Config{Device: under, Prefix: prefix, Pin: m.pins("worker"), Log: m.cfg.Log})
		return err
	})
}

func (m *Machine) file(node string) string  { return filepath.Join(m.cfg.Dir, node+".json") }
func (m *Machine) space(name string) string { return filepath.Join(m.cfg.Dir, "ns", name) }

// enter opens the namespaces. whole: all of them were there.
func (m *Machine) enter() (whole bool, err error) {
	whole = true
	for name, at := range map[string]**link.Namespace{"worker": &m.worker, "switch": &m.switches, "a": &m.nodes[0].ns, "b": &m.nodes[1].ns} {
		ns, made, err := link.Named(m.space(name))
		if err != nil {
			return false, err
		}
		*at, whole = ns, whole && !made
	}
	return whole, nil
}

// leave closes the namespaces.
func (m *Machine) leave() {
	for _, at := range []**link.Namespace{&m.worker, &m.switches, &m.nodes[0].ns, &m.nodes[1].ns} {
		if *at != nil {
			(*at).Close()
			*at = nil
		}
	}
}

// recognize says whether the nodes are what this program would make of them, and learns their pairs and processes.
func (m *Machine) recognize() bool {
	for i, n := range m.nodes {
		was, err := readConfig(n.file)
		if err != nil {
			return false
		}
		if _, err := os.Stat(filepath.Dir(was.Status)); err != nil {
			return false // nobody could ask it
		}
		for _, p := range was.Pairs {
			m.pairs[p.ID], m.whole[p.ID] = p, true
		}
		n.cfg = m.layout(i, filepath.Dir(was.Status))
		if was.Pairs = n.cfg.Pairs; !reflect.DeepEqual(was, n.cfg) {
			return false
		}
		if n.former = find(n.file); n.former != nil {
			n.process = n.former.Process
		}
	}
	return true
}

func readConfig(file string) (c gateway.Config, err error) {
	b, err := os.ReadFile(file)
	if err == nil {
		err = json.Unmarshal(b, &c)
	}
	return c, err
}

func (m *Machine) pins(name string) string { return filepath.Join(m.cfg.Dir, "bpf-"+name) }

// wire connects the namespaces.
func (m *Machine) wire() error {
	if err := tunnel.MountPins(m.pins("worker")); err != nil {
		return err
	}
	sw, err := m.switches.Open()
	if err != nil {
		return err
	}
	defer sw.Close()
	if err := sw.AddBridge("switch"); err != nil {
		return err
	}
	plug := func(ns *link.Namespace, port string, at netip.Addr) error {
		if err := link.Cable(link.End{In: m.switches, Name: port}, link.End{In: ns, Name: under}); err != nil {
			return err
		}
		return errors.Join(sw.Enslave(port, "switch"), sw.SetUp(port, true), address(ns, under, netip.PrefixFrom(at, 24)))
	}
	if err := plug(m.worker, "worker", workerAddr); err != nil {
		return err
	}
	if err := link.Cable(link.End{In: m.nodes[0].ns, Name: sync0}, link.End{In: m.nodes[1].ns, Name: sync0}); err != nil {
		return err
	}
	for i, n := range m.nodes {
		if err := errors.Join(plug(n.ns, n.name, netip.AddrFrom4([4]byte{192, 0, 2, byte(2 + i)})), address(n.ns, sync0, netip.PrefixFrom(syncAddr[i], 30))); err != nil {
			return err
		}
	}
	// The files come last: with them it is whole.
	sockets, err := os.MkdirTemp("", "thaw-net-") // the path of a socket has 107 bytes at most
	if err != nil {
		return err
	}
	for i, n := range m.nodes {
		n.cfg = m.layout(i, sockets)
		if err := n.write(n.cfg.Pairs); err != nil {
			return err
		}
	}
	return nil
}

// layout is the configuration of a node without pairs.
func (m *Machine) layout(i int, sockets string) gateway.Config {
	n := m.nodes[i]
	var all []netip.Prefix
	for _, a := range outers {
		all = append(all, netip.PrefixFrom(a, 24))
	}
	return gateway.Config{
		Name: n.name, Device: under, Outer: all, Priority: 200 - 100*i, Advert: gateway.Duration(advert),
		Sync: fmt.Sprintf("%s,%s,%s", sync0, syncAddr[i], syncAddr[1-i]), Status: filepath.Join(sockets, n.name), Namespace: n.dir,
		WorkerSet: []gateway.Worker{{Outer: workerAddr, Prefix: netip.MustParsePrefix(prefix)}}, Pairs: []gateway.Pair{},
	}
}

func address(ns *link.Namespace, device string, p netip.Prefix) error {
	c, err := ns.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	d, err := c.Device(device)
	if err != nil {
		return err
	}
	return errors.Join(c.SetAddress(d.Index, p, 0), c.SetUp(device, true))
}

// Attach is instance.Networks'.
func (m *Machine) Attach(namespace, subnet string) (*os.File, error) {
	return m.slots.Attach(namespace, subnet)
}

// Run keeps the nodes and the slots at work until ctx ends, and takes everything away then.
func (m *Machine) Run(ctx context.Context, store *objects.Store) error {
	m.ran = true
	defer m.Close()
	if m.adopted { // whoever wrote the files may not have come to say so
		m.mu.Lock()
		err := m.tell()
		m.mu.Unlock()
		if err != nil {
			return err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	below, stop := context.WithCancel(context.WithoutCancel(ctx))
	for _, n := range m.nodes {
		g.Go(func() error { return m.keep(below, n) })
	}
	g.Go(func() error { return m.slots.Run(ctx, store, func() {}) })
	g.Go(func() error { m.scale(ctx); return nil })
	g.Go(func() error {
		defer stop()
		<-ctx.Done()
		m.mu.Lock()
		ids := slices.Collect(maps.Keys(m.pairs))
		clear(m.pairs)
		err := m.tell()
		m.mu.Unlock()
		if err != nil {
			return err
		}
		last, cancel := context.WithTimeout(below, farewell)
		defer cancel()
		for _, n := range m.nodes {
			for s, err := n.ask(); err == nil && len(s.Pairs) > 0 && wait(last); {
				s, err = n.ask()
			}
			for _, id := range ids {
				err = errors.Join(err, n.unplug(id))
			}
		}
		return err
	})
	return g.Wait()
}

// wait passes a moment, and says whether there is more time.
func wait(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(poll):
		return true
	}
}

// keep runs a node's process again and again until ctx ends. Killing this one does not end it: see Open.
func (m *Machine) keep(ctx context.Context, n *node) error {
	for p := n.former; ctx.Err() == nil; p = nil {
		err := error(nil)
		if p == nil {
			p, err = start(m.cfg.Program, n)
		}
		if err == nil {
			m.mu.Lock()
			n.process = p.Process
			m.mu.Unlock()
			err = p.attend(ctx)
		}
		if ctx.Err() == nil {
			m.cfg.Log.Warn("gateway node ended, starting it again", "node", n.name, "err", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
		}
	}
	return nil
}

// Close takes away what is there; what was adopted stays unless Run has been called. Run does it at its end; a second call does nothing.
func (m *Machine) Close() {
	if m.closed {
		return
	}
	m.closed = true
	if m.slots != nil {
		if err := m.slots.Close(); err != nil {
			m.cfg.Log.Warn("slots", "err", err)
		}
	}
	m.leave()
	if m.host != nil {
		m.host.Close()
	}
	if !m.adopted || m.ran {
		m.sweep()
	}
}

// Sweep takes away what an earlier process with this folder left.
func Sweep(cfg Config) {
	if _, err := os.Stat(cfg.Dir); err != nil {
		return // as a rule: nothing needs to be looked for
	}
	m := New(cfg)
	m.sweep()
	for _, dir := range []string{"a", "b", "ns", filepath.Base(m.pins("worker")), "."} { // what is not empty stays, and is looked at the next time
		_ = syscall.Rmdir(filepath.Join(cfg.Dir, dir))
	}
}

// sweep ends the nodes and takes away what holds on to the kernel by a name in the folder.
func (m *Machine) sweep() {
	for _, name := range []string{"a", "b"} {
		file := m.file(name)
		if p := find(file); p != nil {
			_ = p.Kill()
			<-p.ended
		}
		if c, err := readConfig(file); err == nil && filepath.Base(c.Status) == name {
			os.Remove(c.Status)
			os.Remove(filepath.Dir(c.Status)) // the last of the two does it
			m.unplug(name, c.Pairs)
		}
		os.Remove(file)
		m.unname(filepath.Join(m.cfg.Dir, name))
	}
	m.unname(filepath.Join(m.cfg.Dir, "ns"))
	_ = syscall.Unmount(m.pins("worker"), syscall.MNT_DETACH) // not mounted: as wished
}

// unplug takes a node's cables out of this machine's bridges. They go with the node's namespace too, but later.
func (m *Machine) unplug(node string, pairs []gateway.Pair) {
	c, err := link.Open()
	if err != nil {
		return
	}
	defer c.Close()
	for _, p := range pairs {
		if err := c.DeleteDevice(hostDevice(node, p.ID)); err != nil {
			m.cfg.Log.Warn("cable of a pair", "err", err)
		}
	}
}

// unname lets go of the namespaces that a folder holds.
func (m *Machine) unname(dir string) {
	held, _ := os.ReadDir(dir) // not there: nothing is held
	for _, e := range held {
		if err := link.Unname(filepath.Join(dir, e.Name())); err != nil {
			m.cfg.Log.Warn("namespace", "err", err)
		}
	}
}

// EnsurePair is reconcile.Network's.
func (m *Machine) EnsurePair(ctx context.Context, p reconcile.Pair) (reconcile.PairStatus, error) {
	st := reconcile.PairStatus{Address: outers[0], Driver: string(tunnel.Ebpf), MTU: underMTU - tunnel.Ebpf.Overhead()}
	if p.ENI.Bridge == "" {
		return st, errors.New("thaw dev reaches subnets by a bridge of this machine only: give the subnet one, or run thaw gateway for cards")
	}
	if err := m.plug(p); err != nil {
		return st, err
	}
	m.mu.Lock()
	err := m.setLocked(p)
	m.mu.Unlock()
	if err != nil {
		return st, err
	}
	soon, cancel := context.WithTimeout(ctx, made)
	defer cancel()
	for {
		var now [2]answer
		for i, n := range m.nodes {
			now[i].Status, now[i].err = n.ask()
			st.Members = append(st.Members[:i], now[i].member(n.name, p.ID))
			if st.Members[i].State == "" {
				st.Members[i].State = api.PairCreating
			}
		}
		if !slices.ContainsFunc(st.Members, func(m api.GatewayMember) bool { return m.State != api.PairActive }) || !wait(soon) {
			m.mu.Lock()
			defer m.mu.Unlock()
			st.Pairs = m.listLocked(p, now)
			return st, nil
		}
	}
}

// plug lays a cable from the subnet's bridge to a bridge of each node.
func (m *Machine) plug(p reconcile.Pair) error {
	host, err := m.host.Open()
	if err != nil {
		return err
	}
	defer host.Close()
	if _, err := host.Device(p.ENI.Bridge); err != nil {
		return fmt.Errorf("bridge: %w", err)
	}
	for _, n := range m.nodes {
		if err := n.plug(m.host, host, p); err != nil {
			return err
		}
	}
	return nil
}

func hostDevice(node string, id uint32) string { return fmt.Sprintf("thaw%s%d", node, id) }
func bridge(id uint32) string                  { return fmt.Sprintf("br%d", id) }
func uplink(id uint32) string                  { return fmt.Sprintf("up%d", id) }

func (n *node) plug(ns *link.Namespace, host *link.Conn, p reconcile.Pair) error {
	c, err := n.ns.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := c.Device(bridge(p.ID)); errors.Is(err, link.ErrNoDevice) {
		err = c.AddBridge(bridge(p.ID))
		if err != nil {
			return err
		}
	}
	at := hostDevice(n.name, p.ID)
	if _, err := c.Device(uplink(p.ID)); errors.Is(err, link.ErrNoDevice) {
		if err := link.Cable(link.End{In: ns, Name: at}, link.End{In: n.ns, Name: uplink(p.ID)}); err != nil {
			return err
		}
	}
	return errors.Join(host.Enslave(at, p.ENI.Bridge), host.SetUp(at, true), c.Enslave(uplink(p.ID), bridge(p.ID)), c.SetUp(uplink(p.ID), true))
}

// RemovePair is reconcile.Network's.
func (m *Machine) RemovePair(ctx context.Context, p reconcile.Pair) error {
	m.mu.Lock()
	of := m.ofLocked(p)
	for _, x := range of {
		delete(m.pairs, x.ID)
		delete(m.whole, x.ID)
	}
	delete(m.groups, p.ID)
	err := m.tell()
	m.mu.Unlock()
	if err != nil {
		return err
	}
	for _, n := range m.nodes {
		for _, x := range of {
			for n.has(x.ID) {
				if !wait(ctx) {
					return fmt.Errorf("the gateway node %s does not let go: %w", n.name, context.Cause(ctx))
				}
			}
		}
		if err := n.unplug(p.ID); err != nil {
			return err
		}
	}
	return nil
}

// unplug takes the cable of a pair out, with both ends.
func (n *node) unplug(id uint32) error {
	c, err := n.ns.Open()
	if err != nil {
		return err
	}
	defer c.Close()
	return errors.Join(c.DeleteDevice(uplink(id)), c.DeleteDevice(bridge(id)))
}

// Pairs is reconcile.Network's.
func (m *Machine) Pairs(context.Context) ([]reconcile.Pair, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var list []reconcile.Pair
	for _, p := range m.pairs {
		namespace, name, k := split(p.Name)
		if k > 0 {
			continue // it goes with the first
		}
		list = append(list, reconcile.Pair{Namespace: namespace, Name: name, ID: p.ID, Key: uint32(p.VPC)})
	}
	return list, nil
}

// tell writes the nodes' configurations, and has them read. Called with mu held.
func (m *Machine) tell() error {
	var list []gateway.Pair
	for _, id := range slices.Sorted(maps.Keys(m.pairs)) {
		list = append(list, m.pairs[id])
	}
	for _, n := range m.nodes {
		if err := n.write(list); err != nil {
			return err
		}
		if n.process != nil {
			_ = n.process.Signal(syscall.SIGHUP) // one that has just ended reads the file when it starts
		}
	}
	return nil
}

func (n *node) write(pairs []gateway.Pair) error {
	c := n.cfg
	c.Pairs = append([]gateway.Pair{}, pairs...)
	b, err := json.Marshal(c)
	if err != nil {
		return err
	}
	if err := os.WriteFile(n.file+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(n.file+".new", n.file)
}

// ask reads the node's status.
func (n *node) ask() (gateway.Status, error) {
	var s gateway.Status
	c, err := net.DialTimeout("unix", n.cfg.Status, askForOne)
	if err != nil {
		return s, err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(askForOne)); err != nil {
		return s, err
	}
	err = json.NewDecoder(c).Decode(&s)
	return s, err
}

// answer is a node's status, or why there is none.
type answer struct {
	gateway.Status
	err error
}

func (a *answer) pair(id uint32) (gateway.PairStatus, bool) {
	i := slices.IndexFunc(a.Pairs, func(p gateway.PairStatus) bool { return p.ID == id })
	if i < 0 {
		return gateway.PairStatus{}, false
	}
	return a.Pairs[i], true
}

// member is what the node says of its half of a pair. No State: it has none.
func (a *answer) member(node string, id uint32) api.GatewayMember {
	g := api.GatewayMember{Node: node}
	if a.err != nil {
		g.State, g.Message = api.PairCreating, a.err.Error()
		return g
	}
	p, there := a.pair(id)
	if !there {
		return g
	}
	g.Role, g.State = string(a.Role), api.PairActive
	if !p.Link {
		g.State, g.Message = api.PairCreating, "its link into the subnet is down"
	}
	return g
}

// has says whether the node may have a half of a pair yet.
func (n *node) has(id uint32) bool {
	s, err := n.ask()
	a := answer{s, err}
	return a.member(n.name, id).State != ""
}
