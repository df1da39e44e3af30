package shards

import (
	"fmt"
	"testing"

	"github.com/thawrun/thaw/api"
)

func TestSpread(t *testing.T) {
	count := [Count]int{}
	for i := range 64_000 {
		count[Of(api.RevisionID(fmt.Sprintf("team-%d/fn-%05d", i%7, i)))]++
	}
	for s, n := range count {
		if n < 850 || n > 1150 {
			t.Errorf("shard %d has %d of 64,000", s, n)
		}
	}
	for _, members := range [][]string{{"a", "b"}, {"scaler-0", "scaler-1", "scaler-2"}} {
		share := map[string]int{}
		for s := range Count {
			share[Preferred(members, s)]++
		}
		for _, m := range members {
			if n := share[m]; n < Count/len(members)/2 {
				t.Errorf("%s owns %d of %d", m, n, Count)
			}
		}
	}
}

// Who comes takes only from the others, who goes leaves only its own; the order of the members does not matter.
func TestLittleMoves(t *testing.T) {
	for s := range Count {
		two, three := Preferred([]string{"a", "b"}, s), Preferred([]string{"c", "b", "a"}, s)
		if three != two && three != "c" {
			t.Errorf("shard %d went from %s to %s when c came", s, two, three)
		}
		if Preferred(nil, s) != "" || Preferred([]string{"b", "a"}, s) != two {
			t.Errorf("shard %d", s)
		}
	}
}
