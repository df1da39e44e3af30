// Package shards says which part of the revisions a revision belongs to, and which of several processes should own which part. It is
// pure: whoever knows the same members comes to the same answer. That an owner is the only one is internal/owners' business.
package shards

import (
	"hash/fnv"
	"io"
	"slices"

	"github.com/thawrun/thaw/api"
)

// Count is the number of shards. It is part of the contract between processes: all of them must divide alike. 64 spread well over the
// few replicas that there are, and are few enough to be listed at each change.
const Count = 64

// Of is the shard of a revision, below Count.
func Of(id api.RevisionID) int {
	h := fnv.New64a()
	_, _ = io.WriteString(h, string(id))
	return int(mix(h.Sum64()) % Count)
}

// OfNamespace is the shard of all revisions of a revision's namespace. Whoever looks from one revision to another one, as an autoscaler at callers and
// called ones, or at the two ends of a shift of traffic, has both in it.
func OfNamespace(id api.RevisionID) int {
	namespace, _ := id.Split()
	return Of(api.RevisionID(namespace))
}

// Preferred is the member that should own a shard, "" when there is none: the one with the highest hash of both (rendezvous), so
// that a member that comes or goes moves only its own share.
func Preferred(members []string, shard int) string {
	best, most := "", uint64(0)
	for _, m := range slices.Sorted(slices.Values(members)) {
		h := fnv.New64a()
		_, _ = io.WriteString(h, m)
		_, _ = h.Write([]byte{0, byte(shard)})
		if v := mix(h.Sum64()); best == "" || v > most {
			best, most = m, v
		}
	}
	return best
}

// mix spreads what FNV leaves close together for inputs that differ in their last byte (the finalizer of MurmurHash3).
func mix(h uint64) uint64 {
	h ^= h >> 33
	h *= 0xff51afd7ed558ccd
	h ^= h >> 33
	h *= 0xc4ceb9fe1a85ec53
	return h ^ h>>33
}
