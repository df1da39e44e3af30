// Package wire is what autoscaler replicas and those who report to them say to each other: frames of reports one way, orders the other,
// as messages of a gRPC stream (Codec). The encoding is that of protocol buffers, written by hand over protowire, because the messages are few and go
// straight into the types that the parts use; a field that a reader does not know is skipped, and one that a writer does not know is
// zero, so that two versions next to each other understand each other.
package wire

import (
	"errors"
	"fmt"
	"math"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/shards"
)

// MaxFrame bounds the bytes of a message.
const MaxFrame = 4 << 20

// MaxItems bounds the reports, demands, snapshots and instances of a frame, or the orders and claims: an empty one takes two bytes on
// the wire and a hundred in memory.
const MaxItems = 100_000

// ErrFormat is wrapped by errors about bytes that are no message.
var ErrFormat = errors.New("wire: not a message")

// Frame is what a reporter has to say at one moment. Sequences of one stream grow by one.
type Frame struct {
	Sequence  uint64
	Reporter  string  // name, in the first frame
	Agent     bool    // in the first frame: send orders
	Capacity  int     // in the first frame of an agent: units of instances that its node takes; 0 = does not say
	Synced    bool    // all that there is has been told: with this frame and those before
	Told      []Claim // claims whose shards' snapshots have been told, with this frame and those before
	Stats     []endpoints.Stat
	Demands   []endpoints.Demand
	Snapshots []*endpoints.Snapshot
	Calls     []endpoints.Call
	Shifts    []endpoints.Shift // each is asked again until it is answered
	Asks      []api.RevisionID  // whose scaling is to be explained
}

// Order asks a node agent for a number of instances.
type Order struct {
	Revision api.RevisionID
	N        int
	Decided  time.Time
	Epoch    int64 // of the owner's claim; a lower one than seen before is of the past
	AtLeast  bool  // whoever decided has not seen which instances there are, and can take none away
}

// Claim says that the replica owns a shard since the claim of that epoch, and wants to hear everything about it; epoch 0: no more.
type Claim struct {
	Shard int
	Epoch int64
}

// Orders is what a replica has to say at one moment.
type Orders struct {
	Orders []Order
	Claims []Claim
	Learn  bool              // calls are of use: there are revisions that are planned for
	Ready  []endpoints.Shift // answers: the revision has the instances for that shift
	Said   []Said            // answers to Asks
}

// Said is how a revision scales, in whatever words both ends know; none = it is not known.
type Said struct {
	Revision api.RevisionID
	Text     []byte
}

// Codec lets gRPC carry Frame and Orders.
type Codec struct{}

// Name is the content-subtype.
func (Codec) Name() string { return "thaw" }

// Marshal encodes a *Frame or *Orders.
func (Codec) Marshal(v any) ([]byte, error) {
	switch m := v.(type) {
	case *Frame:
		return m.append(nil), nil
	case *Orders:
		return m.append(nil), nil
	}
	return nil, fmt.Errorf("wire: cannot encode %T", v)
}

// Unmarshal decodes into a *Frame or *Orders.
func (Codec) Unmarshal(b []byte, v any) error {
	if len(b) > MaxFrame {
		return fmt.Errorf("%w: %d bytes, at most %d are taken", ErrFormat, len(b), MaxFrame)
	}
	switch m := v.(type) {
	case *Frame:
		return m.parse(b)
	case *Orders:
		return m.parse(b)
	}
	return fmt.Errorf("wire: cannot decode %T", v)
}

func (f *Frame) append(b []byte) []byte {
	b = number(b, 1, int64(f.Sequence))
	b = text(b, 2, f.Reporter)
	b = flag(b, 6, f.Agent)
	b = number(b, 7, int64(f.Capacity))
	b = flag(b, 8, f.Synced)
	var sub []byte // one buffer for all
	for _, c := range f.Told {
		sub = appendClaim(sub[:0], c)
		b = message(b, 9, sub)
	}
	for i := range f.Stats {
		s := &f.Stats[i]
		sub = text(sub[:0], 1, string(s.Revision))
		sub = text(sub, 2, s.Source)
		sub = flag(sub, 3, s.Activator)
		sub = moment(sub, 4, s.Time)
		sub = float(sub, 5, s.Concurrency)
		sub = float(sub, 6, s.ProxiedConcurrency)
		sub = float(sub, 7, s.Requests)
		sub = float(sub, 8, s.ProxiedRequests)
		b = message(b, 3, sub)
	}
	for _, d := range f.Demands {
		sub = text(sub[:0], 1, string(d.Revision))
		sub = number(sub, 2, int64(d.Waiting))
		sub = number(sub, 3, int64(d.Running))
		sub = moment(sub, 4, d.At)
		b = message(b, 4, sub)
	}
	for _, s := range f.Snapshots {
		b = message(b, 5, appendSnapshot(nil, s))
	}
	for _, c := range f.Calls {
		sub = text(sub[:0], 1, string(c.Caller))
		sub = text(sub, 2, string(c.Callee))
		sub = number(sub, 3, int64(c.N))
		b = message(b, 10, sub)
	}
	for _, s := range f.Shifts {
		sub = appendShift(sub[:0], s)
		b = message(b, 11, sub)
	}
	for _, id := range f.Asks {
		b = message(b, 12, []byte(id))
	}
	return b
}

func (f *Frame) parse(b []byte) error {
	*f = Frame{}
	room := budget(MaxItems)
	return fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			f.Sequence = v.n
		case 2:
			f.Reporter = string(v.b)
		case 3:
			if err := room.take(); err != nil {
				return err
			}
			s, err := parseStat(v.b)
			f.Stats = append(f.Stats, s)
			return err
		case 4:
			if err := room.take(); err != nil {
				return err
			}
			d, err := parseDemand(v.b)
			f.Demands = append(f.Demands, d)
			return err
		case 5:
			s, err := parseSnapshot(v.b, &room)
			f.Snapshots = append(f.Snapshots, s)
			return err
		case 6:
			f.Agent = v.n != 0
		case 7:
			if v.n > math.MaxInt32 {
				return fmt.Errorf("%w: a node of %d instances", ErrFormat, int64(v.n))
			}
			f.Capacity = int(v.n)
		case 8:
			f.Synced = v.n != 0
		case 9:
			c, err := parseClaim(v.b)
			f.Told = append(f.Told, c)
			return err
		case 10:
			if err := room.take(); err != nil {
				return err
			}
			c, err := parseCall(v.b)
			f.Calls = append(f.Calls, c)
			return err
		case 11:
			if err := room.take(); err != nil {
				return err
			}
			s, err := parseShift(v.b)
			f.Shifts = append(f.Shifts, s)
			return err
		case 12:
			if err := room.take(); err != nil {
				return err
			}
			f.Asks = append(f.Asks, api.RevisionID(v.b))
		}
		return nil
	})
}

func parseStat(b []byte) (s endpoints.Stat, err error) {
	err = fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			s.Revision = api.RevisionID(v.b)
		case 2:
			s.Source = string(v.b)
		case 3:
			s.Activator = v.n != 0
		case 4:
			s.Time = v.time()
		case 5:
			s.Concurrency = v.float()
		case 6:
			s.ProxiedConcurrency = v.float()
		case 7:
			s.Requests = v.float()
		case 8:
			s.ProxiedRequests = v.float()
		}
		return nil
	})
	return s, err
}

func parseCall(b []byte) (c endpoints.Call, err error) {
	err = fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			c.Caller = api.RevisionID(v.b)
		case 2:
			c.Callee = api.RevisionID(v.b)
		case 3:
			return v.count(&c.N)
		}
		return nil
	})
	return c, err
}

func appendShift(b []byte, s endpoints.Shift) []byte {
	b = text(b, 1, string(s.From))
	b = text(b, 2, string(s.To))
	return float(b, 3, s.Weight)
}

func parseShift(b []byte) (s endpoints.Shift, err error) {
	err = fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			s.From = api.RevisionID(v.b)
		case 2:
			s.To = api.RevisionID(v.b)
		case 3:
			s.Weight = v.float()
		}
		return nil
	})
	return s, err
}

func parseDemand(b []byte) (d endpoints.Demand, err error) {
	err = fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			d.Revision = api.RevisionID(v.b)
		case 2:
			return v.count(&d.Waiting)
		case 3:
			return v.count(&d.Running)
		case 4:
			d.At = v.time()
		}
		return nil
	})
	return d, err
}

func appendSnapshot(b []byte, s *endpoints.Snapshot) []byte {
	b = text(b, 1, string(s.Revision))
	b = number(b, 2, int64(s.Sequence))
	b = number(b, 3, int64(s.Desired))
	var sub []byte
	for i := range s.Instances {
		in := &s.Instances[i]
		sub = text(sub[:0], 1, in.ID)
		sub = number(sub, 2, int64(in.State))
		sub = text(sub, 3, in.Addr)
		sub = number(sub, 4, int64(in.Capacity))
		sub = flag(sub, 5, in.Adopted)
		for j, t := range in.Start.All() {
			sub = moment(sub, firstMoment+protowire.Number(j), *t)
		}
		b = message(b, 4, sub)
	}
	if f := s.Failure; f != nil {
		sub = text(sub[:0], 1, f.Reason)
		sub = text(sub, 2, f.Message)
		sub = number(sub, 3, int64(f.Count))
		sub = moment(sub, 4, f.At)
		sub = moment(sub, 5, f.Until)
		sub = flag(sub, 6, f.Served)
		b = message(b, 5, sub)
	}
	return b
}

func parseSnapshot(b []byte, room *budget) (*endpoints.Snapshot, error) {
	s := &endpoints.Snapshot{}
	if err := room.take(); err != nil {
		return s, err
	}
	err := fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			s.Revision = api.RevisionID(v.b)
		case 2:
			s.Sequence = v.n
		case 3:
			return v.count(&s.Desired)
		case 4:
			if err := room.take(); err != nil {
				return err
			}
			in, err := parseInstance(v.b)
			s.Instances = append(s.Instances, in)
			return err
		case 5:
			var err error
			s.Failure, err = parseFailure(v.b)
			return err
		}
		return nil
	})
	for i := range s.Instances { // at the end: fields may come in any order
		s.Instances[i].Revision = s.Revision
	}
	return s, err
}

func parseInstance(b []byte) (in endpoints.Instance, err error) {
	err = fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			in.ID = string(v.b)
		case 2:
			if v.n >= uint64(endpoints.Gone) {
				return fmt.Errorf("%w: state %d of an instance", ErrFormat, v.n)
			}
			in.State = endpoints.State(v.n)
		case 3:
			in.Addr = string(v.b)
		case 4:
			return v.count(&in.Capacity)
		case 5:
			in.Adopted = v.n != 0
		}
		if i, all := int(n)-firstMoment, in.Start.All(); i >= 0 && i < len(all) {
			*all[i] = v.time()
		}
		return nil
	})
	return in, err
}

// firstMoment is the number of the first of an instance's start times; the others follow.
const firstMoment = 6

func parseFailure(b []byte) (*endpoints.Failure, error) {
	f := &endpoints.Failure{}
	err := fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			f.Reason = string(v.b)
		case 2:
			f.Message = string(v.b)
		case 3:
			return v.count(&f.Count)
		case 4:
			f.At = v.time()
		case 5:
			f.Until = v.time()
		case 6:
			f.Served = v.n != 0
		}
		return nil
	})
	return f, err
}

func (o *Orders) append(b []byte) []byte {
	var sub []byte
	for _, x := range o.Orders {
		sub = text(sub[:0], 1, string(x.Revision))
		sub = number(sub, 2, int64(x.N))
		sub = moment(sub, 3, x.Decided)
		sub = number(sub, 4, x.Epoch)
		sub = flag(sub, 5, x.AtLeast)
		b = message(b, 1, sub)
	}
	for _, c := range o.Claims {
		sub = appendClaim(sub[:0], c)
		b = message(b, 2, sub)
	}
	b = flag(b, 3, o.Learn)
	for _, s := range o.Ready {
		sub = appendShift(sub[:0], s)
		b = message(b, 4, sub)
	}
	for _, s := range o.Said {
		sub = text(sub[:0], 1, string(s.Revision))
		sub = text(sub, 2, string(s.Text))
		b = message(b, 5, sub)
	}
	return b
}

func appendClaim(b []byte, c Claim) []byte {
	return number(number(b, 1, int64(c.Shard)), 2, c.Epoch)
}

func (o *Orders) parse(b []byte) error {
	*o = Orders{}
	room := budget(MaxItems)
	return fields(b, func(n protowire.Number, v value) error {
		if err := room.take(); err != nil {
			return err
		}
		switch n {
		case 1:
			x, err := parseOrder(v.b)
			o.Orders = append(o.Orders, x)
			return err
		case 2:
			c, err := parseClaim(v.b)
			o.Claims = append(o.Claims, c)
			return err
		case 3:
			o.Learn = v.n != 0
		case 4:
			s, err := parseShift(v.b)
			o.Ready = append(o.Ready, s)
			return err
		case 5:
			s, err := parseSaid(v.b)
			o.Said = append(o.Said, s)
			return err
		}
		return nil
	})
}

func parseSaid(b []byte) (s Said, err error) {
	err = fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			s.Revision = api.RevisionID(v.b)
		case 2:
			s.Text = append([]byte(nil), v.b...)
		}
		return nil
	})
	return s, err
}

func parseClaim(b []byte) (c Claim, err error) {
	err = fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			if v.n >= shards.Count {
				return fmt.Errorf("%w: shard %d", ErrFormat, v.n)
			}
			c.Shard = int(v.n)
		case 2:
			c.Epoch = int64(v.n)
		}
		return nil
	})
	return c, err
}

func parseOrder(b []byte) (x Order, err error) {
	err = fields(b, func(n protowire.Number, v value) error {
		switch n {
		case 1:
			x.Revision = api.RevisionID(v.b)
		case 2:
			return v.count(&x.N)
		case 3:
			x.Decided = v.time()
		case 4:
			x.Epoch = int64(v.n)
		case 5:
			x.AtLeast = v.n != 0
		}
		return nil
	})
	return x, err
}

// The writers leave zeros out, as proto3 does.

func number(b []byte, n protowire.Number, v int64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), uint64(v))
}

func flag(b []byte, n protowire.Number, v bool) []byte {
	return number(b, n, int64(protowire.EncodeBool(v)))
}

func moment(b []byte, n protowire.Number, t time.Time) []byte {
	if t.IsZero() {
		return b
	}
	return number(b, n, t.UnixNano())
}

func float(b []byte, n protowire.Number, v float64) []byte {
	if v == 0 {
		return b
	}
	return protowire.AppendFixed64(protowire.AppendTag(b, n, protowire.Fixed64Type), math.Float64bits(v))
}

func text(b []byte, n protowire.Number, s string) []byte {
	if s == "" {
		return b
	}
	return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), s)
}

func message(b []byte, n protowire.Number, m []byte) []byte {
	return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), m)
}

// value is a field's content: n for numbers, b for bytes, each empty when the field is of the other kind.
type value struct {
	n uint64
	b []byte
}

func (v value) float() float64 { return math.Float64frombits(v.n) }

// count takes what an int32 holds and is not negative: more of anything there cannot be.
func (v value) count(to *int) error {
	if v.n > math.MaxInt32 {
		return fmt.Errorf("%w: a number of %d", ErrFormat, int64(v.n))
	}
	*to = int(v.n)
	return nil
}

// budget is how many items a message may still have.
type budget int

func (b *budget) take() error {
	if *b--; *b < 0 {
		return fmt.Errorf("%w: more than %d items", ErrFormat, MaxItems)
	}
	return nil
}

// time is a moment of the sender's wall clock, tied to this process's monotonic clock as it is now: what is worked out from it later does not change
// when the wall clock is put right meanwhile.
func (v value) time() time.Time {
	if v.n == 0 {
		return time.Time{}
	}
	now, t := time.Now(), time.Unix(0, int64(v.n))
	ahead := t.Sub(now)
	if ahead == math.MinInt64 { // too long ago for a duration
		return t
	}
	return now.Add(ahead)
}

// fields hands over each field of a message; kinds that are not in use are skipped.
func fields(b []byte, f func(protowire.Number, value) error) error {
	for len(b) > 0 {
		n, kind, size := protowire.ConsumeTag(b)
		if size < 0 {
			return fmt.Errorf("%w: %w", ErrFormat, protowire.ParseError(size))
		}
		b = b[size:]
		var v value
		switch kind {
		case protowire.VarintType:
			v.n, size = protowire.ConsumeVarint(b)
		case protowire.Fixed64Type:
			v.n, size = protowire.ConsumeFixed64(b)
		case protowire.BytesType:
			v.b, size = protowire.ConsumeBytes(b)
		default:
			size = protowire.ConsumeFieldValue(n, kind, b)
		}
		if size < 0 {
			return fmt.Errorf("%w: field %d: %w", ErrFormat, n, protowire.ParseError(size))
		}
		b = b[size:]
		if err := f(n, v); err != nil {
			return err
		}
	}
	return nil
}
