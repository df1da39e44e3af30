package reconcile

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
	"github.com/thawrun/thaw/internal/state"
)

// network is a model of gateways. It outlives the reconcilers, as the kernel's devices do.
type network struct {
	mu       sync.Mutex
	pairs    map[name]Pair
	halves   map[name]int // how many members are there, of 2
	fail     func(call string, p Pair) error
	slow     time.Duration      // of each call
	sleeping map[name]bool      // pairs whose second member does not get active
	busy     map[name]bool      // a call is under way
	overlaps int                // calls about one pair at once
	removed  []string           // in order
	keys     map[uint32]string  // pair by key
	wrong    []string           // what must not happen
	ensured  map[name]time.Time // of the first call
}

func newNetwork() *network {
	return &network{pairs: map[name]Pair{}, halves: map[name]int{}, sleeping: map[name]bool{}, busy: map[name]bool{}, keys: map[uint32]string{}, ensured: map[name]time.Time{}}
}

func (n *network) enter(ctx context.Context, call string, p Pair) error {
	id := name{p.Namespace, p.Name}
	n.mu.Lock()
	if n.busy[id] {
		n.overlaps++
	}
	n.busy[id] = true
	slow, fail := n.slow, n.fail
	n.mu.Unlock()
	if slow > 0 {
		select {
		case <-time.After(slow):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if fail != nil {
		return fail(call, p)
	}
	return nil
}

func (n *network) EnsurePair(ctx context.Context, p Pair) (PairStatus, error) {
	id := name{p.Namespace, p.Name}
	defer n.set(func() { n.busy[id] = false })
	err := n.enter(ctx, "ensure", p)
	n.mu.Lock()
	defer n.mu.Unlock()
	if other := n.keys[p.Key]; other != "" && other != p.Namespace+"/"+p.Name {
		n.wrong = append(n.wrong, fmt.Sprintf("key %d of %s is in use by %s", p.Key, p.Name, other))
	}
	if p.Key == 0 || p.ID == 0 || len(p.HAVIPs) == 0 || !p.CIDR.IsValid() {
		n.wrong = append(n.wrong, fmt.Sprintf("incomplete: %+v", p))
	}
	n.keys[p.Key] = p.Namespace + "/" + p.Name
	n.pairs[id] = p
	if err != nil {
		n.halves[id] = max(n.halves[id], 1)
		return PairStatus{Members: []api.GatewayMember{{Node: "a", State: api.PairActive}}}, err
	}
	n.halves[id] = 2
	st := PairStatus{Address: netip.MustParseAddr("192.0.2.1"), Driver: "ebpf", MTU: 1472, Members: []api.GatewayMember{{Node: "a", State: api.PairActive, Role: api.RoleMaster}, {Node: "b", State: api.PairActive, Role: api.RoleBackup}}}
	if n.sleeping[id] {
		st.Members[1].State, st.Members[1].Message = api.PairCreating, "its table is not full yet"
	}
	return st, nil
}

func (n *network) RemovePair(ctx context.Context, p Pair) error {
	id := name{p.Namespace, p.Name}
	defer n.set(func() { n.busy[id] = false })
	if err := n.enter(ctx, "remove", p); err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.pairs, id)
	delete(n.halves, id)
	delete(n.keys, p.Key)
	n.removed = append(n.removed, p.Name)
	return nil
}

func (n *network) Pairs(context.Context) ([]Pair, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return slices.Collect(maps.Values(n.pairs)), nil
}

func (n *network) set(f func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	f()
}

// names of the pairs that are there, each with how many members.
func (n *network) String() string {
	n.mu.Lock()
	defer n.mu.Unlock()
	var all []string
	for id := range n.pairs {
		all = append(all, fmt.Sprintf("%s:%d", id.name, n.halves[id]))
	}
	slices.Sort(all)
	return strings.Join(all, " ")
}

func (n *network) check(t *testing.T) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.overlaps > 0 || len(n.wrong) > 0 {
		t.Errorf("%d calls about one pair at once; %v", n.overlaps, n.wrong)
	}
}

func inNet(t *testing.T, cfg Config, f func(h *house, n *network)) {
	n := newNetwork()
	cfg.Network = n
	inHouseWith(t, cfg, func(h *house) { f(h, n) })
	n.check(t)
}

func aVPC(name string) *api.VPC {
	return &api.VPC{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: name}}
}

func aSubnet(vpc, name, cidr string) *api.Subnet {
	return &api.Subnet{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: name}, Spec: api.SubnetSpec{VPC: vpc, CIDR: cidr, ENI: api.ENI{Bridge: "br0"}}}
}

func joins(ref string) func(*api.Service) { return annotated(api.AnnotationSubnet, ref) }

func (h *house) subnet(name string) *api.Subnet   { return get[*api.Subnet](h, api.Subnets, name) }
func (h *house) gateway(name string) *api.Gateway { return get[*api.Gateway](h, api.Gateways, name) }

// wantReady compares an object's condition Ready, or another one, with "STATUS Reason: words of the message".
func (h *house) wantReady(o api.Object, typ, want string) {
	h.t.Helper()
	got := "absent"
	if c := api.StatusOf(o).Conditions.Get(typ); c != nil {
		got = strings.TrimSpace(c.Status + " " + c.Reason + ": " + c.Message)
	}
	parts := strings.SplitN(want, ": ", 2)
	if !strings.HasPrefix(got, parts[0]) || len(parts) > 1 && !strings.Contains(got, parts[1]) {
		h.t.Errorf("%s %s %s is %q, want %q", api.KindOf(o).Kind, o.Meta().Name, typ, got, want)
	}
}

// The first function of a subnet makes the gateway; it is not started before both members are active.
func TestFirstFunctionMakesGateway(t *testing.T) {
	inNet(t, Config{}, func(h *house, n *network) {
		h.create(aVPC("v"))
		h.create(aSubnet("v", "s", "10.0.1.0/24"))
		h.wantReady(h.subnet("s"), api.ConditionReady, "True")
		h.missing(api.Gateways, "s")
		if got := h.subnet("s").Status; got.Key == 0 || fmt.Sprint(got.HAVIPs) != "[10.0.1.254]" || got.Gateway != "" {
			t.Errorf("%+v", got)
		}
		if v := get[*api.VPC](h, api.VPCs, "v"); !v.Status.Conditions.IsTrue(api.ConditionReady) || fmt.Sprint(v.Status.Subnets) != "[s]" {
			t.Errorf("%+v", v.Status)
		}
		n.set(func() { n.sleeping[name{ns, "s"}] = true })
		h.create(service("f", "dev.local/a", joins("v/s")))
		h.sleep(2 * time.Second)
		gw := h.gateway("s")
		h.wantReady(gw, api.ConditionReady, "Unknown CreatingGateway: member on b is creating: its table is not full yet")
		if gw.Status.Key != h.subnet("s").Status.Key || gw.Status.ID == 0 || gw.Status.Address != "192.0.2.1" || gw.Status.State != api.PairCreating || len(gw.Status.Members) != 2 || gw.Status.MTU != 1472 {
			t.Errorf("%+v", gw.Status)
		}
		h.wantReady(h.revision("f-00001"), api.ConditionNetworkReady, "Unknown GatewayNotReady: its table is not full yet")
		h.wantReady(h.service("f"), api.ConditionReady, "Unknown")
		if ids := h.p.known(); len(ids) != 0 {
			t.Errorf("handed over before its network is there: %v", ids)
		}
		n.set(func() { n.sleeping[name{ns, "s"}] = false })
		h.sleep(2 * time.Second)
		h.wantReady(h.gateway("s"), api.ConditionReady, "True")
		h.wantReady(h.revision("f-00001"), api.ConditionNetworkReady, "True")
		h.wantReady(h.service("f"), api.ConditionReady, "True")
		if h.subnet("s").Status.Gateway != "s" {
			t.Errorf("%+v", h.subnet("s").Status)
		}
		// One member that fails later is the gateway's matter, and told there.
		n.set(func() { n.fail = func(string, Pair) error { return errors.New("node b is gone") } })
		h.sleep(pairPoll + time.Second)
		h.wantReady(h.gateway("s"), api.ConditionReady, "False GatewayFailed: node b is gone")
		h.wantReady(h.revision("f-00001"), api.ConditionReady, "True")
	})
}

// A function whose subnet is not there says what to do, and gets ready when it is done.
func TestUnknownSubnet(t *testing.T) {
	inNet(t, Config{}, func(h *house, n *network) {
		h.create(service("f", "dev.local/a", joins("v/s")))
		h.sleep(time.Second)
		h.wantReady(h.revision("f-00001"), api.ConditionReady, "False SubnetMissing: There is no subnet v/s in namespace default: create it (thaw subnet create s --vpc v")
		h.create(aSubnet("v", "s", "10.0.1.0/24"))
		h.wantReady(h.subnet("s"), api.ConditionReady, "False VPCMissing: There is no VPC v in namespace default")
		h.wantReady(h.revision("f-00001"), api.ConditionReady, "False SubnetNotReady: There is no VPC v")
		h.create(aVPC("v"))
		h.sleep(time.Second)
		h.wantReady(h.revision("f-00001"), api.ConditionReady, "True")
		h.wantReady(h.service("f"), api.ConditionReady, "True")
		// Of another VPC there is none of that name.
		h.create(aVPC("w"))
		h.create(service("g", "dev.local/a", joins("w/s")))
		h.sleep(time.Second)
		h.wantReady(h.revision("g-00001"), api.ConditionReady, "False SubnetMissing: There is no subnet w/s")
	})
}

func TestNoNetwork(t *testing.T) {
	inHouse(t, func(h *house) {
		h.create(aVPC("v"))
		h.create(aSubnet("v", "s", "10.0.1.0/24"))
		h.wantReady(h.subnet("s"), api.ConditionReady, "True")
		h.create(service("f", "dev.local/a", joins("v/s")))
		h.create(service("plain", "dev.local/a"))
		h.sleep(time.Second)
		h.wantReady(h.revision("f-00001"), api.ConditionReady, "False NoNetwork: thaw doctor net")
		h.wantReady(h.revision("plain-00001"), api.ConditionReady, "True")
		if h.revision("plain-00001").Status.Conditions.Get(api.ConditionNetworkReady) != nil {
			t.Error("a revision without a subnet has the condition")
		}
	})
}

// A gateway stays for an hour after the last function, and goes then without a trace.
func TestGatewayLingers(t *testing.T) {
	inNet(t, Config{}, func(h *house, n *network) {
		h.create(aVPC("v"))
		h.create(aSubnet("v", "s", "10.0.1.0/24"))
		h.create(service("f", "dev.local/a", joins("v/s")))
		h.sleep(time.Second)
		first := h.gateway("s")
		h.delete(api.Services, "f")
		h.sleep(59 * time.Minute)
		if g := h.gateway("s"); g.Status.IdleSince == nil || n.String() != "s:2" {
			t.Errorf("%+v, %s", g.Status, n)
		}
		h.create(service("f", "dev.local/a", joins("v/s")))
		h.sleep(2 * time.Minute)
		if g := h.gateway("s"); g.Status.IdleSince != nil || g.UID != first.UID {
			t.Errorf("%+v", g.Status)
		}
		h.delete(api.Services, "f")
		h.sleep(61 * time.Minute)
		h.missing(api.Gateways, "s")
		if n.String() != "" || h.subnet("s").Status.Gateway != "" {
			t.Errorf("left: %s %+v", n, h.subnet("s").Status)
		}
		// Made anew it is what it was.
		h.create(service("f", "dev.local/a", joins("v/s")))
		h.sleep(time.Second)
		if g := h.gateway("s"); g.Status.ID != first.Status.ID || g.Status.Key != first.Status.Key {
			t.Errorf("%+v, before %+v", g.Status, first.Status)
		}
		// One that people made stays.
		h.create(aSubnet("v", "t", "10.0.2.0/24"))
		h.create(&api.Gateway{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: "mine"}, Spec: api.GatewaySpec{Subnet: "v/t"}})
		h.sleep(3 * time.Hour)
		h.wantReady(h.gateway("mine"), api.ConditionReady, "True")
	})
}

// A subnet takes its gateway with it, however often taking it away fails.
func TestSubnetTakesGateway(t *testing.T) {
	inNet(t, Config{}, func(h *house, n *network) {
		h.create(aVPC("v"))
		h.create(aSubnet("v", "s", "10.0.1.0/24"))
		h.create(service("f", "dev.local/a", joins("v/s")))
		h.sleep(time.Second)
		h.delete(api.Services, "f")
		fails := 0
		n.set(func() {
			n.fail = func(call string, _ Pair) error {
				if fails++; call == "remove" && fails < 5 {
					return errors.New("the cloud is busy")
				}
				return nil
			}
		})
		h.delete(api.Subnets, "s")
		h.sleep(5 * time.Minute)
		h.missing(api.Gateways, "s")
		if n.String() != "" || fails < 5 {
			t.Errorf("left: %s after %d calls", n, fails)
		}
	})
}

// What a process that died left half done, the next one finishes: the same pair, or none.
func TestGatewayReplay(t *testing.T) {
	inNet(t, Config{GatewayTimeout: 30 * time.Second}, func(h *house, n *network) {
		cfg := Config{Network: n, GatewayTimeout: 30 * time.Second}
		h.create(aVPC("v"))
		h.create(aSubnet("v", "s", "10.0.1.0/24"))
		n.set(func() { n.slow = 10 * time.Second })
		h.create(service("f", "dev.local/a", joins("v/s")))
		h.sleep(5 * time.Second) // in the middle of the first call
		before := h.gateway("s").Status
		h.stop()
		if n.String() == "" || before.ID == 0 {
			t.Fatalf("%s %+v", n, before)
		}
		h.start(cfg)
		h.sleep(15 * time.Second)
		if now := h.gateway("s").Status; now.ID != before.ID || now.Key != before.Key || now.State != api.PairActive || n.String() != "s:2" {
			t.Errorf("%+v, before %+v, %s", now, before, n)
		}
		h.wantReady(h.service("f"), api.ConditionReady, "True")
		// The object goes while nobody is there to see it.
		h.delete(api.Services, "f")
		h.sleep(time.Second)
		h.stop()
		h.delete(api.Gateways, "s")
		h.start(cfg)
		h.sleep(30 * time.Second)
		if n.String() != "" {
			t.Errorf("left: %s", n)
		}
	})
}

// A network that hangs holds up nothing else.
func TestNetworkHangs(t *testing.T) {
	inNet(t, Config{Workers: 1}, func(h *house, n *network) {
		n.set(func() { n.slow = time.Hour })
		h.create(aVPC("v"))
		for i := range 8 {
			s := fmt.Sprintf("s%d", i)
			h.create(aSubnet("v", s, fmt.Sprintf("10.0.%d.0/24", i)))
			h.create(service("f"+s, "dev.local/a", joins("v/"+s)))
		}
		h.create(service("plain", "dev.local/a"))
		h.sleep(time.Second)
		h.wantReady(h.service("plain"), api.ConditionReady, "True")
		h.sleep(2 * time.Minute)
		h.wantReady(h.gateway("s0"), api.ConditionReady, "False GatewayFailed: no answer within 1m0s")
	})
}

// Keys and IDs are of one subnet at a time, and run out with a clear word.
func TestKeysAndIDs(t *testing.T) {
	inNet(t, Config{FirstKey: 7, LastKey: 9, MaxPairs: 2, GatewayLinger: -1}, func(h *house, n *network) {
		h.create(aVPC("v"))
		seen := map[int64]bool{}
		for i := range 4 {
			s := fmt.Sprintf("s%d", i)
			h.create(aSubnet("v", s, fmt.Sprintf("10.0.%d.0/24", i)))
			h.create(service("f"+s, "dev.local/a", joins("v/"+s)))
			h.sleep(time.Second)
			if i < 3 {
				k := h.subnet(s).Status.Key
				if k < 7 || k > 9 || seen[k] {
					t.Errorf("%s has key %d, others %v", s, k, seen)
				}
				seen[k] = true
			}
		}
		h.wantReady(h.subnet("s3"), api.ConditionReady, "False Exhausted: All 3 keys from 7 to 9 are in use")
		h.wantReady(h.revision("fs3-00001"), api.ConditionReady, "False SubnetNotReady: All 3 keys")
		if h.gateway("s0").Status.ID == h.gateway("s1").Status.ID {
			t.Error("two gateways have one ID")
		}
		h.wantReady(h.gateway("s2"), api.ConditionReady, "False Exhausted: There are 2 gateways already")
		// A key is free only when the pair that used it is really gone.
		key := h.subnet("s0").Status.Key
		n.set(func() {
			n.fail = func(call string, _ Pair) error {
				if call == "remove" {
					return errors.New("not yet")
				}
				return nil
			}
		})
		h.delete(api.Services, "fs0")
		h.delete(api.Subnets, "s0")
		h.sleep(5 * time.Second)
		h.wantReady(h.subnet("s3"), api.ConditionReady, "False Exhausted")
		n.set(func() { n.fail = nil })
		h.sleep(5 * time.Minute)
		if got := h.subnet("s3").Status.Key; got != key {
			t.Errorf("key %d, want %d", got, key)
		}
		// The ID that was free with it has gone to one of the two that waited.
		if a, b := h.gateway("s2").Status.State, h.gateway("s3").Status.State; (a == api.PairActive) == (b == api.PairActive) {
			t.Errorf("s2 is %s, s3 is %s", a, b)
		}
	})
}

// Of subnets that overlap, written past the API server's check, the older stands; the younger one may when that is gone.
func TestOverlapOlderWins(t *testing.T) {
	inNet(t, Config{}, func(h *house, n *network) {
		h.create(aVPC("v"))
		h.create(aSubnet("v", "z", "10.0.1.0/24"))
		h.sleep(2 * time.Second)
		h.create(aSubnet("v", "a", "10.0.1.128/25"))
		h.create(service("f", "dev.local/a", joins("v/a")))
		h.sleep(time.Second)
		h.wantReady(h.subnet("z"), api.ConditionReady, "True")
		h.wantReady(h.subnet("a"), api.ConditionReady, "False Overlap: it overlaps with 10.0.1.0/24 of subnet z")
		h.wantReady(h.revision("f-00001"), api.ConditionReady, "False SubnetNotReady")
		h.delete(api.Subnets, "z")
		h.sleep(time.Second)
		h.wantReady(h.subnet("a"), api.ConditionReady, "True")
		h.wantReady(h.revision("f-00001"), api.ConditionReady, "True")
	})
}

// Fixed egress needs an elastic IP, which reaches the pair; taken away it leaves it.
func TestFixedEgress(t *testing.T) {
	inNet(t, Config{}, func(h *house, n *network) {
		h.create(aVPC("v"))
		h.create(aSubnet("v", "s", "10.0.1.0/24"))
		h.create(service("f", "dev.local/a", joins("v/s"), annotated(api.AnnotationEgress, api.EgressFixed)))
		h.sleep(time.Second)
		h.wantReady(h.revision("f-00001"), api.ConditionReady, "False ElasticIPMissing: thaw eip create NAME --address ADDR --subnet v/s")
		e := &api.ElasticIP{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: "e"}, Spec: api.ElasticIPSpec{Address: "203.0.113.7"}}
		stored := h.create(e).(*api.ElasticIP)
		h.wantReady(get[*api.ElasticIP](h, api.ElasticIPs, "e"), api.ConditionBound, "False NotBound")
		stored.Spec.Subnet, stored.ResourceVersion = "v/s", ""
		if _, err := h.store.Update(h.ctx, api.ElasticIPs, stored); err != nil {
			t.Fatal(err)
		}
		h.sleep(time.Second)
		h.wantReady(get[*api.ElasticIP](h, api.ElasticIPs, "e"), api.ConditionReady, "True")
		h.wantReady(h.revision("f-00001"), api.ConditionReady, "True")
		public := func() (s string) {
			n.set(func() { s = fmt.Sprint(n.pairs[name{ns, "s"}].Public) })
			return s
		}
		if got := public(); got != "map[10.0.1.254:203.0.113.7]" {
			t.Error(got)
		}
		h.delete(api.ElasticIPs, "e")
		h.sleep(time.Second)
		if got := public(); got != "map[]" || slices.Contains(n.removed, "s") {
			t.Error(got, n.removed)
		}
	})
}

// Whatever comes, with faults and restarts at any moment: when all is quiet there is one whole pair for each subnet with functions and
// none besides, and no key was ever of two.
func TestNetworkProperty(t *testing.T) {
	for seed := range uint64(20) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		cfg := Config{FirstKey: 1, LastKey: 6, GatewayLinger: time.Minute}
		inNet(t, cfg, func(h *house, n *network) {
			cfg.Network = n
			var broken atomic.Bool
			var mu sync.Mutex // guards faults: pairs are made side by side
			faults := rand.New(rand.NewPCG(seed, 2))
			n.fail = func(string, Pair) error {
				mu.Lock()
				defer mu.Unlock()
				if broken.Load() && faults.IntN(2) == 0 {
					return errors.New("injected")
				}
				return nil
			}
			h.create(aVPC("v"))
			there := map[string]bool{}
			for range 60 {
				s := fmt.Sprintf("s%d", rnd.IntN(5))
				switch rnd.IntN(6) {
				case 0:
					h.tryCreate(aSubnet("v", s, "10.0."+s[1:]+".0/24"))
				case 1:
					if h.tryCreate(service("f"+s, "dev.local/a", joins("v/"+s))) {
						there[s] = true
					}
				case 2:
					if there[s] {
						h.delete(api.Services, "f"+s)
						delete(there, s)
					}
				case 3:
					if !there[s] {
						h.store.Delete(h.ctx, api.Subnets, ns, s, "", "")
					}
				case 4:
					n.set(func() { broken.Store(!broken.Load()); n.slow = time.Duration(rnd.IntN(3)) * time.Second })
				case 5:
					h.stop()
					h.start(cfg)
				}
				h.sleep(time.Duration(rnd.IntN(20_000)) * time.Millisecond)
			}
			n.set(func() { broken.Store(false) })
			h.sleep(time.Hour)
			var want []string
			for s := range there {
				if _, err := h.store.Get(h.ctx, api.Subnets, ns, s); err == nil {
					want = append(want, s+":2")
					h.wantReady(h.service("f"+s), api.ConditionReady, "True")
				}
			}
			slices.Sort(want)
			if got := n.String(); got != strings.Join(want, " ") {
				t.Errorf("seed %d: pairs %q, want %q", seed, got, want)
			}
		})
	}
}

func (h *house) tryCreate(o api.Object) bool {
	_, err := h.store.Create(h.ctx, api.KindOf(o), o)
	synctest.Wait()
	return err == nil
}

// A second process that allocates from the same store does not give a key away that the first one's cache does not show.
func TestAllocateReadsStore(t *testing.T) {
	inNet(t, Config{FirstKey: 1, LastKey: 2}, func(h *house, n *network) {
		h.create(aVPC("v"))
		other := objects.New(h.mem, time.Now)
		s := aSubnet("v", "x", "10.0.9.0/24")
		o, err := other.Create(h.ctx, api.Subnets, s)
		if err != nil && !errors.Is(err, state.ErrExists) {
			t.Fatal(err)
		}
		synctest.Wait()
		h.create(aSubnet("v", "y", "10.0.8.0/24"))
		if x, y := h.subnet("x").Status.Key, h.subnet("y").Status.Key; x == y || x == 0 || y == 0 {
			t.Errorf("%d and %d of %s", x, y, o.Meta().Name)
		}
	})
}
