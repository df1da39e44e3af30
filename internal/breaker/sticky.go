package breaker

import "slices"

// stickLocked returns the target that a key belongs to: the first by rendezvous hashing among those that have a slot and are within the bound
// of load. When targets come and go only the keys move that belong to them, and every process that knows the same targets
// chooses the same. The bound is a quarter above the average, at least one request: a key that all the world sends spreads over its next best targets.
func (b *Breaker) stickLocked(key uint64, tried []*Target) (best *Target) {
	// ceil(5/4 * (running + this one) / targets)
	n := 4 * len(b.ready)
	bound := (5*(b.running+1) + n - 1) / n
	var score uint64
	for _, t := range b.ready {
		if t.full() || t.inflight >= max(1, bound*t.share/whole) || slices.Contains(tried, t) {
			continue
		}
		if s := mix(key ^ t.hash); best == nil || s > score {
			best, score = t, s
		}
	}
	if best == nil {
		return b.leastLocked(tried)
	}
	return best
}

// KeyOf makes a key of what requests have in common; it is never 0.
func KeyOf(s []byte) uint64 {
	h := uint64(offset64)
	for _, c := range s {
		h = (h ^ uint64(c)) * prime64
	}
	return max(mix(h), 1)
}

func hashID(id string) uint64 {
	h := uint64(offset64)
	for i := range len(id) {
		h = (h ^ uint64(id[i])) * prime64
	}
	return mix(h)
}

// FNV-1a, whose last bytes reach few bits: mix spreads them.
const (
	offset64 = 14695981039346656037
	prime64  = 1099511628211
)

// mix is the finalizer of MurmurHash3 (Appleby, public domain): each bit of x reaches each bit of the result.
func mix(x uint64) uint64 {
	x ^= x >> 33
	x *= 0xff51afd7ed558ccd
	x ^= x >> 33
	x *= 0xc4ceb9fe1a85ec53
	return x ^ x>>33
}
