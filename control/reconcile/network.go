package reconcile

import (
	"context"
	"fmt"
	"hash/fnv"
	"maps"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
)

// Network makes pairs of gateways. Its methods may take long (a cloud's API), may fail half way, and are called again with the same at
// any time: what they make is named after the pair, so that a second call finds what the first one left. Calls about one pair never
// overlap.
type Network interface {
	// EnsurePair makes a pair what it should be and tells what it is now. With an error it is not complete yet; the status says what is there.
	EnsurePair(context.Context, Pair) (PairStatus, error)
	// RemovePair takes away everything of a pair; of one that is not there nothing, which is no error.
	RemovePair(context.Context, Pair) error
	// Pairs returns those that are there, whole or in part, also from an earlier process: at least namespace, name, ID and key of each.
	Pairs(context.Context) ([]Pair, error)
}

// Pair is what a Gateway should be. It is comparable but for its lists.
type Pair struct {
	Namespace, Name string       // of the Gateway
	Subnet          string       // VPC/SUBNET
	ID              uint32       // of no other pair: 1 to Config.MaxPairs
	Key             uint32       // of the subnet, on the wire
	CIDR            netip.Prefix // of the subnet
	Router          netip.Addr   // the tenant's own, to what lies outside CIDR; not valid: none
	ENI             api.ENI
	HAVIPs          []netip.Addr
	Most            int                       // pairs that the network may make of it under load, by dealing out the HAVIPs; at least 1
	Nodes           []string                  // of the two members; none: the network chooses
	Public          map[netip.Addr]netip.Addr // elastic IPs by HAVIP
}

// sameButPublic says that one pair can become the other one without being made anew.
func (p Pair) sameButPublic(o Pair) bool {
	p.Public, o.Public = nil, nil
	return reflect.DeepEqual(p, o)
}

// PairStatus is what a pair is.
type PairStatus struct {
	Address netip.Addr // on the underlay; tunnels lead there
	Driver  string     // of the tunnels
	MTU     int        // of functions, bytes
	Members []api.GatewayMember
	Pairs   []api.GatewayPair // all, where there may be several
}

// active says that both members can carry the traffic.
func (s PairStatus) active() bool {
	return len(s.Members) == 2 && !slices.ContainsFunc(s.Members, func(m api.GatewayMember) bool { return m.State != api.PairActive })
}

// Back-off of a pair that cannot be made or removed, and how often one is looked at.
const (
	firstPairRetry = time.Second
	lastPairRetry  = time.Minute
	pairPoll       = 10 * time.Second // one that is complete
	pairPollSoon   = time.Second      // one that is not yet
)

// pairs is what is known of the network's pairs. Its entries are named after Gateways that are, or were.
type pairs struct {
	mu     sync.Mutex
	listed bool // what earlier processes left is in of
	of     map[name]*pairWork
}

// pairWork is a pair with the call about it that is under way, if any. Guarded by pairs.mu.
type pairWork struct {
	pair    Pair // as it was last to be made, or found
	running bool
	made    bool // EnsurePair has answered at least once for pair
	status  PairStatus
	err     error
	at      time.Time // of the last answer
	tries   int       // failures in a row
}

// wait is how long nothing is to be done after the last answer.
func (w *pairWork) wait() time.Duration {
	switch {
	case w.err != nil:
		return min(firstPairRetry<<min(max(w.tries-1, 0), 16), lastPairRetry)
	case w.status.active() && !slices.ContainsFunc(w.status.Pairs, func(p api.GatewayPair) bool { return p.State != api.PairActive }):
		return pairPoll
	}
	return pairPollSoon
}

// taken returns the keys and IDs of all pairs, also of those that are being removed.
func (p *pairs) taken() (keys, ids map[uint64]bool, listed bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	keys, ids = map[uint64]bool{}, map[uint64]bool{}
	for _, w := range p.of {
		keys[uint64(w.pair.Key)] = true
		ids[uint64(w.pair.ID)] = true
	}
	return keys, ids, p.listed
}

// reconcileNetwork learns what earlier processes left, once: whatever has no Gateway any more is removed.
func (r *Reconcilers) reconcileNetwork(ctx context.Context) error {
	if r.cfg.Network != nil {
		sub, cancel := context.WithTimeout(ctx, r.cfg.StoreTimeout)
		defer cancel()
		left, err := r.cfg.Network.Pairs(sub)
		if err != nil {
			return fmt.Errorf("list the pairs of gateways: %w", err)
		}
		r.pairs.mu.Lock()
		for _, p := range left {
			r.pairs.of[name{p.Namespace, p.Name}] = &pairWork{pair: p}
		}
		r.pairs.mu.Unlock()
		for _, p := range left {
			r.queue.add(key{kindGateway, p.Namespace, p.Name})
		}
	}
	r.pairs.mu.Lock()
	r.pairs.listed = true
	r.pairs.mu.Unlock()
	r.queueNet(api.Subnets)
	r.queueNet(api.Gateways)
	return nil
}

// queueNet queues all objects of a kind.
func (r *Reconcilers) queueNet(k *api.Kind) {
	for _, o := range r.cache.all(k) {
		n := nameOf(o)
		r.queue.add(key{kindOfNet[k], n.namespace, n.name})
	}
}

var kindOfNet = map[*api.Kind]kind{api.VPCs: kindVPC, api.Subnets: kindSubnet, api.Gateways: kindGateway, api.ElasticIPs: kindElasticIP}

// netChanged says who must look again after an object of a network appeared, changed or went.
func (r *Reconcilers) netChanged(old, now api.Object) {
	o := now
	if o == nil {
		o = old
	}
	n := nameOf(o)
	r.queue.add(key{kindOfNet[api.KindOf(o)], n.namespace, n.name})
	switch o := o.(type) {
	case *api.VPC:
		for _, s := range r.cache.all(api.Subnets) {
			if s := s.(*api.Subnet); s.Namespace == o.Namespace && s.Spec.VPC == o.Name {
				r.queue.add(key{kindSubnet, s.Namespace, s.Name})
			}
		}
	case *api.Subnet:
		r.queue.add(key{kindVPC, n.namespace, o.Spec.VPC})
		r.queueSubnetUsers(n.namespace, o.Ref())
		if old == nil || now == nil {
			r.queueNet(api.Subnets) // of those that overlapped with it one may stand now; a key may be free
		}
	case *api.Gateway:
		r.queueSubnet(n.namespace, o.Spec.Subnet)
		r.queue.add(keys(r.cache, r.cache.revisionsOfSubnet, name{n.namespace, o.Spec.Subnet}, kindRevision)...)
		if now == nil {
			r.queueNet(api.Gateways) // an ID may be free
		}
	case *api.ElasticIP:
		for _, some := range []api.Object{old, now} {
			if e, ok := some.(*api.ElasticIP); ok && e.Spec.Subnet != "" {
				r.queueSubnetUsers(n.namespace, e.Spec.Subnet)
			}
		}
		if old == nil || now == nil || old.Meta().Generation != now.Meta().Generation {
			r.queueNet(api.ElasticIPs) // the next one may have the address now
		}
	}
}

// queueSubnet queues a subnet by VPC/SUBNET.
func (r *Reconcilers) queueSubnet(namespace, ref string) {
	if _, subnet, ok := api.SplitSubnet(ref); ok {
		r.queue.add(key{kindSubnet, namespace, subnet})
	}
}

// queueSubnetUsers queues what leans on a subnet.
func (r *Reconcilers) queueSubnetUsers(namespace, ref string) {
	for _, g := range r.cache.all(api.Gateways) {
		if g := g.(*api.Gateway); g.Namespace == namespace && g.Spec.Subnet == ref {
			r.queue.add(key{kindGateway, namespace, g.Name})
		}
	}
	for _, e := range r.cache.all(api.ElasticIPs) {
		if e := e.(*api.ElasticIP); e.Namespace == namespace && e.Spec.Subnet == ref {
			r.queue.add(key{kindElasticIP, namespace, e.Name})
		}
	}
	r.queue.add(keys(r.cache, r.cache.revisionsOfSubnet, name{namespace, ref}, kindRevision)...)
}

// neighbours are the objects that o has to get on with. Of o's own kind they are the older ones: of two that cannot stand together the first
// stays as it is.
func (r *Reconcilers) neighbours(o api.Object) *api.Neighbours {
	n := &api.Neighbours{}
	for _, k := range netKinds {
		for _, other := range r.cache.all(k) {
			if api.KindOf(o) != k || older(other.Meta(), o.Meta()) {
				n.Add(other)
			}
		}
	}
	return n
}

// older compares by creation, which has whole seconds only, and then by what never changes.
func older(a, b *api.ObjectMeta) bool {
	var ta, tb time.Time
	if a.CreationTimestamp != nil {
		ta = a.CreationTimestamp.Time
	}
	if b.CreationTimestamp != nil {
		tb = b.CreationTimestamp.Time
	}
	if !ta.Equal(tb) {
		return ta.Before(tb)
	}
	return a.UID < b.UID
}

func (r *Reconcilers) reconcileVPC(ctx context.Context, k key) error {
	vpc, _ := r.cache.netObject(api.VPCs, k.of()).(*api.VPC)
	if vpc == nil {
		return nil
	}
	next := *vpc
	next.Status.ObservedGeneration = vpc.Generation
	next.Status.Subnets = nil
	for _, o := range r.cache.all(api.Subnets) {
		if s := o.(*api.Subnet); s.Namespace == vpc.Namespace && s.Spec.VPC == vpc.Name {
			next.Status.Subnets = append(next.Status.Subnets, s.Name)
		}
	}
	slices.Sort(next.Status.Subnets)
	next.Status.Conditions.Set(r.cfg.Now(), api.ConditionReady, api.True, "", "")
	return r.updateStatus(ctx, api.VPCs, vpc, &next)
}

// reconcileSubnet gives a subnet its key and addresses, and a gateway as long as functions need one.
func (r *Reconcilers) reconcileSubnet(ctx context.Context, k key) error {
	s, _ := r.cache.netObject(api.Subnets, k.of()).(*api.Subnet)
	if s == nil {
		return nil
	}
	now := r.cfg.Now()
	next := *s
	st := &next.Status
	st.ObservedGeneration = s.Generation
	c := &st.Conditions
	r.judgeSubnet(s, c, now)
	if c.IsTrue(api.ConditionVPCReady) && len(st.HAVIPs) == 0 {
		st.HAVIPs = s.AllocateHAVIPs()
	}
	if len(st.HAVIPs) > 0 {
		c.Set(now, api.ConditionHAVIPsAllocated, api.True, "", "")
	} else {
		c.Set(now, api.ConditionHAVIPsAllocated, api.Unknown, "", "")
	}
	gw := r.gatewayOf(s.Namespace, s.Ref())
	st.Gateway = ""
	if gw != nil {
		st.Gateway = gw.Name
	}
	if st.Key == 0 && c.IsTrue(api.ConditionVPCReady) {
		return r.allocateKey(ctx, s, &next, now)
	}
	r.keyCondition(c, st.Key, now)
	c.Summarise(now, api.ConditionReady, api.ReadyDependents(api.Subnets)...)
	if err := r.updateStatus(ctx, api.Subnets, s, &next); err != nil {
		return err
	}
	if gw != nil || r.cfg.Network == nil || !c.IsTrue(api.ConditionReady) || !r.hasFunctions(s.Namespace, s.Ref()) {
		return nil
	}
	made := &api.Gateway{ObjectMeta: api.ObjectMeta{Namespace: s.Namespace, Name: s.Name, OwnerReferences: ownedBy(api.Subnets, &s.ObjectMeta)}, Spec: api.GatewaySpec{Subnet: s.Ref()}}
	r.cfg.Log.Info("gateway for the first function of a subnet", "namespace", s.Namespace, "subnet", s.Ref())
	_, err := r.create(ctx, api.Gateways, made) // of the same name every time: a second try finds the first
	return err
}

// judgeSubnet says whether a subnet can stand in its VPC.
func (r *Reconcilers) judgeSubnet(s *api.Subnet, c *api.Conditions, now time.Time) {
	n := r.neighbours(s)
	switch {
	case n.VPC(s.Namespace, s.Spec.VPC) == nil:
		c.Set(now, api.ConditionVPCReady, api.False, api.ReasonVPCMissing, fmt.Sprintf("There is no VPC %s in namespace %s.", s.Spec.VPC, s.Namespace))
	default:
		if errs := n.Conflicts(s); len(errs) > 0 {
			c.Set(now, api.ConditionVPCReady, api.False, api.ReasonOverlap, errs.Error())
			return
		}
		c.Set(now, api.ConditionVPCReady, api.True, "", "")
	}
}

func (r *Reconcilers) keyCondition(c *api.Conditions, key int64, now time.Time) {
	if key != 0 {
		c.Set(now, api.ConditionKeyAllocated, api.True, "", "")
	} else {
		c.Set(now, api.ConditionKeyAllocated, api.Unknown, "", "")
	}
}

// allocateKey writes the status of a subnet with a key that no other subnet and no pair has. What others have is read from the store, since
// the cache may be behind a write of another process that led before.
func (r *Reconcilers) allocateKey(ctx context.Context, s, next *api.Subnet, now time.Time) error {
	r.allocating.Lock()
	defer r.allocating.Unlock()
	taken, _, listed := r.pairs.taken()
	if !listed {
		return nil // the end of reconcileNetwork queues all subnets
	}
	all, err := r.listStore(ctx, api.Subnets)
	if err != nil {
		return err
	}
	for _, o := range all {
		taken[uint64(o.(*api.Subnet).Status.Key)] = true
	}
	first, size := uint64(r.cfg.FirstKey), uint64(r.cfg.LastKey)-uint64(r.cfg.FirstKey)+1
	c := &next.Status.Conditions
	if n, ok := allocate(s.Namespace+"/"+s.Name, size, func(i uint64) bool { return taken[first+i] }); ok {
		next.Status.Key = int64(first + n)
		c.Set(now, api.ConditionKeyAllocated, api.True, "", "")
	} else {
		c.Set(now, api.ConditionKeyAllocated, api.False, api.ReasonExhausted, fmt.Sprintf("All %d keys from %d to %d are in use: delete a subnet that is not needed, or give the installation more keys.", size, r.cfg.FirstKey, r.cfg.LastKey))
	}
	c.Summarise(now, api.ConditionReady, api.ReadyDependents(api.Subnets)...)
	return r.updateStatus(ctx, api.Subnets, s, next)
}

// allocate returns a free number below size. It begins where the name says, so that the same name gets the same number again where it can,
// and another name does not get the number of one that has just gone, which caches in the network may still know.
func allocate(name string, size uint64, taken func(uint64) bool) (uint64, bool) {
	h := fnv.New64a()
	h.Write([]byte(name))
	start := h.Sum64() % size
	for i := range size {
		if n := (start + i) % size; !taken(n) {
			return n, true
		}
	}
	return 0, false
}

// listStore reads all objects of a kind from the store.
func (r *Reconcilers) listStore(ctx context.Context, k *api.Kind) ([]api.Object, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.StoreTimeout)
	defer cancel()
	all, _, err := r.store.List(ctx, k, "")
	return all, err
}

// gatewayOf returns the oldest gateway of a subnet, nil if there is none.
func (r *Reconcilers) gatewayOf(namespace, ref string) (gw *api.Gateway) {
	for _, o := range r.cache.all(api.Gateways) {
		if g := o.(*api.Gateway); g.Namespace == namespace && g.Spec.Subnet == ref && (gw == nil || older(&g.ObjectMeta, &gw.ObjectMeta)) {
			gw = g
		}
	}
	return gw
}

// hasFunctions says whether there is a revision that joins a subnet.
func (r *Reconcilers) hasFunctions(namespace, ref string) bool {
	return len(keys(r.cache, r.cache.revisionsOfSubnet, name{namespace, ref}, kindRevision)) > 0
}

func (r *Reconcilers) reconcileElasticIP(ctx context.Context, k key) error {
	e, _ := r.cache.netObject(api.ElasticIPs, k.of()).(*api.ElasticIP)
	if e == nil {
		return nil
	}
	now := r.cfg.Now()
	next := *e
	st := &next.Status
	st.ObservedGeneration, st.HAVIP = e.Generation, ""
	c := &st.Conditions
	n := r.neighbours(e)
	s := n.Subnet(e.Namespace, e.Spec.Subnet)
	status, reason, message := api.True, "", ""
	switch errs := n.Conflicts(e); {
	case e.Spec.Subnet != "" && s == nil:
		status, reason, message = api.False, api.ReasonSubnetMissing, fmt.Sprintf("There is no subnet %s in namespace %s.", e.Spec.Subnet, e.Namespace)
	case s != nil && len(s.Status.HAVIPs) == 0:
		status, reason = api.Unknown, api.ReasonSubnetNotReady
	case len(errs) > 0:
		status, reason, message = api.False, api.ReasonOverlap, errs.Error()
	case s != nil && e.Spec.HAVIP != "":
		st.HAVIP = e.Spec.HAVIP
	case s != nil:
		st.HAVIP = s.Status.HAVIPs[0]
	}
	c.Set(now, api.ConditionSubnetReady, status, reason, message)
	if st.HAVIP != "" {
		c.SetInfo(now, api.ConditionBound, api.True, "", "")
	} else if e.Spec.Subnet == "" {
		c.SetInfo(now, api.ConditionBound, api.False, api.ReasonNotBound, "spec.subnet names no subnet.")
	} else {
		c.SetInfo(now, api.ConditionBound, api.False, reason, message)
	}
	c.Summarise(now, api.ConditionReady, api.ReadyDependents(api.ElasticIPs)...)
	return r.updateStatus(ctx, api.ElasticIPs, e, &next)
}

// reconcileGateway makes a gateway's pair what it should be, or takes it away when the gateway is gone or was idle for long.
func (r *Reconcilers) reconcileGateway(ctx context.Context, k key) error {
	gw, _ := r.cache.netObject(api.Gateways, k.of()).(*api.Gateway)
	if gw == nil {
		r.removePair(ctx, k.of())
		return nil
	}
	if gone, err := r.removeOrphan(ctx, api.Gateways, gw); gone || err != nil {
		return err
	}
	now := r.cfg.Now()
	next := *gw
	st := &next.Status
	st.ObservedGeneration = gw.Generation
	if gone, err := r.idle(ctx, gw, st, now); gone || err != nil {
		return err
	}
	c := &st.Conditions
	s := r.subnetOf(gw, c, now)
	if s != nil && st.ID == 0 {
		// What is to be made is written down first: whoever comes after a crash makes the same. The write brings the key back.
		return r.allocateID(ctx, gw, s, &next, now)
	}
	if s != nil {
		r.ensurePair(ctx, k, r.pairFor(&next, s), st, now)
	}
	return r.writeGateway(ctx, gw, &next, now)
}

func (r *Reconcilers) writeGateway(ctx context.Context, gw, next *api.Gateway, now time.Time) error {
	c := &next.Status.Conditions
	if c.Get(api.ConditionMembersActive) == nil {
		c.Set(now, api.ConditionMembersActive, api.Unknown, api.ReasonCreatingGateway, "")
		next.Status.State = api.PairCreating
	}
	c.Summarise(now, api.ConditionReady, api.ReadyDependents(api.Gateways)...)
	return r.updateStatus(ctx, api.Gateways, gw, next)
}

// idle notes since when no function needs a gateway that the platform has made, and deletes it when that is long ago: ENIs may take
// long to make, and functions come back.
func (r *Reconcilers) idle(ctx context.Context, gw *api.Gateway, st *api.GatewayStatus, now time.Time) (gone bool, err error) {
	if controller(gw) == nil || r.hasFunctions(gw.Namespace, gw.Spec.Subnet) {
		st.IdleSince = nil
		return false, nil
	}
	if st.IdleSince == nil {
		st.IdleSince = &api.Time{Time: now.UTC().Truncate(time.Second)}
	}
	if wait := st.IdleSince.Add(r.cfg.GatewayLinger).Sub(now); wait > 0 {
		r.queue.addAfter(key{kindGateway, gw.Namespace, gw.Name}, wait)
		return false, nil
	}
	r.cfg.Log.Info("gateway without functions removed", "namespace", gw.Namespace, "gateway", gw.Name, "idle_since", st.IdleSince.Time)
	return true, r.delete(ctx, api.Gateways, gw, "")
}

// subnetOf is a gateway's subnet when a pair can be made for it; else nil, and the condition says why.
func (r *Reconcilers) subnetOf(gw *api.Gateway, c *api.Conditions, now time.Time) *api.Subnet {
	n := r.neighbours(gw)
	s := n.Subnet(gw.Namespace, gw.Spec.Subnet)
	status, reason, message := api.True, "", ""
	switch errs := n.Conflicts(gw); {
	case r.cfg.Network == nil:
		status, reason, message = api.False, api.ReasonNoNetwork, noNetwork
	case s == nil:
		status, reason, message = api.False, api.ReasonSubnetMissing, fmt.Sprintf("There is no subnet %s in namespace %s.", gw.Spec.Subnet, gw.Namespace)
	case len(errs) > 0:
		status, reason, message = api.False, api.ReasonOverlap, errs.Error()
	case s.Status.Key == 0 || len(s.Status.HAVIPs) == 0:
		status, reason = api.Unknown, api.ReasonSubnetNotReady
		if ready := s.Status.Conditions.Get(api.ConditionReady); ready != nil {
			message = ready.Message
		}
	}
	c.Set(now, api.ConditionSubnetReady, status, reason, message)
	if status != api.True {
		return nil
	}
	return s
}

const noNetwork = "This installation has no gateways into networks: start thaw dev with --networks, as root; thaw doctor net says what the machine can do."

// allocateID writes the status of a gateway with an ID that no other gateway and no pair has, and with what it takes from its subnet.
func (r *Reconcilers) allocateID(ctx context.Context, gw *api.Gateway, s *api.Subnet, next *api.Gateway, now time.Time) error {
	r.allocating.Lock()
	defer r.allocating.Unlock()
	_, taken, listed := r.pairs.taken()
	if !listed {
		return nil // the end of reconcileNetwork queues all gateways
	}
	all, err := r.listStore(ctx, api.Gateways)
	if err != nil {
		return err
	}
	for _, o := range all {
		taken[uint64(o.(*api.Gateway).Status.ID)] = true
	}
	st, size := &next.Status, uint64(r.cfg.MaxPairs)
	if n, ok := allocate(gw.Namespace+"/"+gw.Name, size, func(i uint64) bool { return taken[i+1] }); ok {
		st.ID, st.Key, st.HAVIPs, st.State = int64(n+1), s.Status.Key, s.Status.HAVIPs, api.PairCreating
		st.Conditions.Set(now, api.ConditionMembersActive, api.Unknown, api.ReasonCreatingGateway, "")
	} else {
		st.Conditions.Set(now, api.ConditionMembersActive, api.False, api.ReasonExhausted, fmt.Sprintf("There are %d gateways already, and no more can be made: delete one that is not needed.", size))
	}
	return r.writeGateway(ctx, gw, next, now)
}

// pairFor is what a gateway should be. What its objects say was checked when they were stored.
func (r *Reconcilers) pairFor(gw *api.Gateway, s *api.Subnet) Pair {
	addr := func(text string) netip.Addr {
		a, _ := netip.ParseAddr(text)
		return a
	}
	p := Pair{Namespace: gw.Namespace, Name: gw.Name, Subnet: gw.Spec.Subnet, ID: uint32(gw.Status.ID), Key: uint32(gw.Status.Key),
		Router: addr(s.Spec.Gateway), ENI: s.Spec.ENI, Most: max(1, int(s.Spec.Pairs)), Nodes: slices.Clone(gw.Spec.Nodes)}
	p.CIDR, _ = netip.ParsePrefix(s.Spec.CIDR)
	for _, h := range gw.Status.HAVIPs {
		p.HAVIPs = append(p.HAVIPs, addr(h))
	}
	for _, o := range r.cache.all(api.ElasticIPs) {
		if e := o.(*api.ElasticIP); e.Namespace == gw.Namespace && e.Spec.Subnet == gw.Spec.Subnet && e.Status.HAVIP != "" {
			if p.Public == nil {
				p.Public = map[netip.Addr]netip.Addr{}
			}
			p.Public[addr(e.Status.HAVIP)] = addr(e.Spec.Address)
		}
	}
	return p
}

// ensurePair writes into st what is known of a pair, and has it made when it is not what it should be, or was not looked at for a while. The key
// comes back with the answer.
func (r *Reconcilers) ensurePair(ctx context.Context, k key, p Pair, st *api.GatewayStatus, now time.Time) {
	r.pairs.mu.Lock()
	defer r.pairs.mu.Unlock()
	if !r.pairs.listed {
		return // the end of reconcileNetwork queues all gateways
	}
	w := r.pairs.of[k.of()]
	if w == nil {
		w = &pairWork{pair: p}
		r.pairs.of[k.of()] = w
	}
	if w.made {
		r.tellPair(w, st, now)
	}
	switch wait := w.at.Add(w.wait()).Sub(now); {
	case w.running:
	case w.made && !w.pair.sameButPublic(p): // of a Gateway of the same name that was there before
		r.startRemoval(ctx, k, w)
	case wait <= 0 || w.at.IsZero() || w.err == nil && !maps.Equal(w.pair.Public, p.Public):
		w.running, w.pair = true, p
		r.background.Go(func() {
			sub, cancel := context.WithTimeoutCause(ctx, r.cfg.GatewayTimeout, fmt.Errorf("no answer within %v", r.cfg.GatewayTimeout))
			defer cancel()
			status, err := r.cfg.Network.EnsurePair(sub, p)
			r.pairAnswered(ctx, k, err, func() { w.made, w.status = true, status })
		})
	default:
		r.queue.addAfter(k, wait)
	}
}

// tellPair writes what the network says of a pair. Called with pairs.mu held.
func (r *Reconcilers) tellPair(w *pairWork, st *api.GatewayStatus, now time.Time) {
	st.Driver, st.MTU, st.Members, st.Pairs, st.State = w.status.Driver, int64(w.status.MTU), w.status.Members, w.status.Pairs, api.PairCreating
	if st.Address = ""; w.status.Address.IsValid() {
		st.Address = w.status.Address.String()
	}
	c := &st.Conditions
	switch {
	case w.err != nil:
		c.Set(now, api.ConditionMembersActive, api.False, api.ReasonGatewayFailed, w.err.Error())
	case w.status.active():
		st.State = api.PairActive
		c.Set(now, api.ConditionMembersActive, api.True, "", "")
	default:
		var lines []string
		for _, m := range w.status.Members {
			if m.State != api.PairActive {
				lines = append(lines, strings.TrimSuffix(fmt.Sprintf("member on %s is %s: %s", m.Node, m.State, m.Message), ": "))
			}
		}
		c.Set(now, api.ConditionMembersActive, api.Unknown, api.ReasonCreatingGateway, join(lines))
	}
}

// removePair takes away the pair of a Gateway that is gone.
func (r *Reconcilers) removePair(ctx context.Context, n name) {
	r.pairs.mu.Lock()
	defer r.pairs.mu.Unlock()
	w := r.pairs.of[n]
	if w == nil || w.running {
		return // the end of the call that runs queues the key
	}
	k := key{kindGateway, n.namespace, n.name}
	if wait := w.at.Add(w.wait()).Sub(r.cfg.Now()); w.err != nil && wait > 0 {
		r.queue.addAfter(k, wait)
		return
	}
	r.startRemoval(ctx, k, w)
}

// startRemoval is called with pairs.mu held.
func (r *Reconcilers) startRemoval(ctx context.Context, k key, w *pairWork) {
	w.running = true
	p := w.pair
	r.background.Go(func() {
		sub, cancel := context.WithTimeoutCause(ctx, r.cfg.GatewayTimeout, fmt.Errorf("no answer within %v", r.cfg.GatewayTimeout))
		defer cancel()
		err := r.cfg.Network.RemovePair(sub, p)
		r.pairAnswered(ctx, k, err, func() {
			if err == nil {
				delete(r.pairs.of, k.of())
			}
		})
		if err == nil { // its key and ID are free
			r.queueNet(api.Subnets)
			r.queueNet(api.Gateways)
		}
	})
}

// pairAnswered notes how a call about a pair ended; f is called with pairs.mu held.
func (r *Reconcilers) pairAnswered(ctx context.Context, k key, err error, f func()) {
	if err != nil && ctx.Err() == nil {
		r.cfg.Log.Warn("pair of gateways", "namespace", k.namespace, "gateway", k.name, "err", err)
	}
	r.pairs.mu.Lock()
	w := r.pairs.of[k.of()]
	w.running, w.err, w.at = false, err, r.cfg.Now()
	if w.tries++; err == nil {
		w.tries = 0
	}
	f()
	r.pairs.mu.Unlock()
	r.queue.add(k)
}

// networked says that a revision's network is there, or that it needs none: its instances may be started.
func networked(rev *api.Revision) bool {
	_, _, joins := rev.Subnet()
	return !joins || rev.Ready() || rev.Status.Conditions.IsTrue(api.ConditionNetworkReady)
}

// readyDependents are what a revision's Ready is made of.
func readyDependents(rev *api.Revision) []string {
	deps := api.ReadyDependents(api.Revisions)
	if _, _, joins := rev.Subnet(); joins {
		deps = append(deps, api.ConditionNetworkReady)
	}
	return deps
}

// judgeNetwork sets NetworkReady of a revision with a subnet. Like the other conditions it stays once the revision was ready: a gateway
// that is repaired is no property of a revision.
func (r *Reconcilers) judgeNetwork(rev *api.Revision, c *api.Conditions, now time.Time) {
	vpc, subnet, joins := rev.Subnet()
	if !joins || rev.Ready() && c.IsTrue(api.ConditionNetworkReady) {
		return
	}
	ref := vpc + "/" + subnet
	set := func(status, reason, format string, args ...any) {
		c.Set(now, api.ConditionNetworkReady, status, reason, fmt.Sprintf(format, args...))
	}
	s, _ := r.cache.netObject(api.Subnets, name{rev.Namespace, subnet}).(*api.Subnet)
	gw := r.gatewayOf(rev.Namespace, ref)
	ready := func(c api.Conditions) *api.Condition {
		if v := c.Get(api.ConditionReady); v != nil {
			return v
		}
		return &api.Condition{Status: api.Unknown}
	}
	switch {
	case r.cfg.Network == nil:
		set(api.False, api.ReasonNoNetwork, noNetwork)
	case s == nil || s.Spec.VPC != vpc:
		set(api.False, api.ReasonSubnetMissing, "There is no subnet %s in namespace %s: create it (thaw subnet create %s --vpc %s -n %s ...), or correct the annotation %s.", ref, rev.Namespace, subnet, vpc, rev.Namespace, api.AnnotationSubnet)
	case ready(s.Status.Conditions).Status != api.True:
		v := ready(s.Status.Conditions)
		set(v.Status, api.ReasonSubnetNotReady, "Subnet %s is not ready: %s", ref, v.Message)
	case rev.Egress() == api.EgressFixed && !r.hasElasticIP(rev.Namespace, ref):
		set(api.False, api.ReasonElasticIPMissing, "Egress is fixed, and subnet %s has no elastic IP: bind one (thaw eip create NAME --address ADDR --subnet %s -n %s).", ref, ref, rev.Namespace)
	case gw == nil:
		set(api.Unknown, api.ReasonCreatingGateway, "The gateway of subnet %s is being made.", ref)
	case ready(gw.Status.Conditions).Status != api.True:
		v := ready(gw.Status.Conditions)
		set(v.Status, api.ReasonGatewayNotReady, "Gateway %s is not ready: %s", gw.Name, v.Message)
	default:
		set(api.True, "", "")
	}
}

func (r *Reconcilers) hasElasticIP(namespace, ref string) bool {
	return slices.ContainsFunc(r.cache.all(api.ElasticIPs), func(o api.Object) bool {
		e := o.(*api.ElasticIP)
		return e.Namespace == namespace && e.Spec.Subnet == ref && e.Status.HAVIP != ""
	})
}
