package planner

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math"
)

// A snapshot is little-endian: version (1 byte), kind (1), then fields in order. The layout stands in docs/planner.md.
const (
	snapshotVersion = 1
	kindFunction    = 'f'
	kindPrior       = 'p'

	levelBytes    = bins*3 + 8 + 4 + 4 + 1
	functionBytes = 2 + 4*4 + 1
	// MaxSnapshot is the most bytes that a snapshot has.
	MaxSnapshot = functionBytes + snapshotLevels*levelBytes
	// snapshotLevels is how many levels a snapshot keeps.
	snapshotLevels = 8
	priorBytes     = 2 + 2*bins*8
)

// ErrSnapshot is wrapped by every error about the bytes of a snapshot.
var ErrSnapshot = errors.New("planner: bad snapshot")

// AppendSnapshot appends what was learnt about a function, at most MaxSnapshot bytes. Calls are not in it: their numbers mean
// nothing elsewhere, and they are learnt again soon.
func (p *Planner) AppendSnapshot(b []byte, id ID) []byte {
	f := &p.fns[id]
	n := min(len(f.levels), snapshotLevels)
	b = append(b, snapshotVersion, kindFunction)
	for _, v := range [...]float32{f.limit, f.start, f.service, f.burst} {
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(v))
	}
	b = append(b, byte(n))
	for i := range n {
		l := &f.levels[i]
		for _, v := range l.p {
			b = binary.LittleEndian.AppendUint16(b, v)
		}
		b = append(b, l.n[:]...)
		b = binary.LittleEndian.AppendUint64(b, math.Float64bits(l.seen))
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(l.spell))
		b = binary.LittleEndian.AppendUint32(b, math.Float32bits(l.period))
		b = append(b, l.hits)
	}
	return b
}

// Restore gives a function what a snapshot of it holds. now is the present time: a snapshot from the future is refused. If the limit of an
// instance has changed since, the levels mean something else and are left out. After an error the function is as before.
func (p *Planner) Restore(now float64, id ID, b []byte) error {
	d, err := decoderOf(b, kindFunction)
	if err != nil {
		return err
	}
	f := function{limit: d.float32(), start: d.float32(), service: d.float32(), burst: d.float32(), used: true}
	n := int(d.byte())
	if d.short || n > snapshotLevels || len(d.b) != n*levelBytes {
		return fmt.Errorf("%w: %d bytes do not hold %d levels", ErrSnapshot, len(b), n)
	}
	for _, v := range [...]float32{f.limit, f.start, f.service, f.burst} {
		if !(v >= 0 && v <= MaxValue) {
			return fmt.Errorf("%w: %v is no time or number of requests", ErrSnapshot, v)
		}
	}
	for range n {
		l, err := d.level(now)
		if err != nil {
			return err
		}
		f.levels = append(f.levels, l)
	}
	if g := &p.fns[id]; f.limit != g.limit {
		f.limit, f.levels = g.limit, nil
	}
	f.burst = max(1, f.burst)
	p.fns[id] = f
	return nil
}

// AppendPrior appends what functions have taught each other.
func (p *Planner) AppendPrior(b []byte) []byte {
	b = append(b, snapshotVersion, kindPrior)
	for _, pr := range [...]*prior{&p.first, &p.up} {
		for i := range pr.odds {
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(pr.odds[i]))
			b = binary.LittleEndian.AppendUint32(b, math.Float32bits(pr.seen[i]))
		}
	}
	return b
}

// RestorePrior takes what AppendPrior wrote. After an error nothing has changed.
func (p *Planner) RestorePrior(b []byte) error {
	d, err := decoderOf(b, kindPrior)
	if err != nil {
		return err
	}
	if len(b) != priorBytes {
		return fmt.Errorf("%w: %d bytes, a prior has %d", ErrSnapshot, len(b), priorBytes)
	}
	var both [2]prior
	for k := range both {
		for i := range both[k].odds {
			odds, seen := d.float32(), d.float32()
			if !(odds >= 0 && odds <= 1 && seen >= 1 && seen <= priorMemory) {
				return fmt.Errorf("%w: a hazard of %v from %v pauses", ErrSnapshot, odds, seen)
			}
			both[k].odds[i], both[k].seen[i] = odds, seen
		}
	}
	p.first, p.up = both[0], both[1]
	return nil
}

// decoder reads fields; after the end it reads zeros and short is set.
type decoder struct {
	b     []byte
	short bool
}

func decoderOf(b []byte, kind byte) (*decoder, error) {
	if len(b) < 2 || b[1] != kind {
		return nil, fmt.Errorf("%w: not a snapshot of this kind", ErrSnapshot)
	}
	if b[0] != snapshotVersion {
		return nil, fmt.Errorf("%w: version %d, this program knows version %d; what was learnt before is left out", ErrSnapshot, b[0], snapshotVersion)
	}
	return &decoder{b: b[2:]}, nil
}

func (d *decoder) take(n int) []byte {
	if len(d.b) < n {
		d.short, d.b = true, nil
		return make([]byte, n)
	}
	v := d.b[:n]
	d.b = d.b[n:]
	return v
}

func (d *decoder) byte() byte { return d.take(1)[0] }
func (d *decoder) float32() float32 {
	return math.Float32frombits(binary.LittleEndian.Uint32(d.take(4)))
}
func (d *decoder) float64() float64 {
	return math.Float64frombits(binary.LittleEndian.Uint64(d.take(8)))
}

func (d *decoder) level(now float64) (level, error) {
	var l level
	for i := range l.p {
		l.p[i] = binary.LittleEndian.Uint16(d.take(2))
	}
	copy(l.n[:], d.take(bins))
	l.seen, l.spell, l.period, l.hits = d.float64(), d.float32(), d.float32(), min(d.byte(), timerFull)
	switch {
	case !(l.seen <= now+1) || l.seen < -1:
		return l, fmt.Errorf("%w: last needed at %v, now is %v", ErrSnapshot, l.seen, now)
	case !(l.period >= 0) || !(l.spell >= 0) || math.IsInf(float64(l.period)+float64(l.spell), 1):
		return l, fmt.Errorf("%w: a timer of %v s, a spell of %v s", ErrSnapshot, l.period, l.spell)
	}
	return l, nil
}
