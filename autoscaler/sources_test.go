package autoscaler

import (
	"fmt"
	"testing"

	"pgregory.net/rapid"
)

// Sources behave as a plain map would, however many there are.
func TestSourcesAgainstPlain(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var s sources
		plain := map[string]int64{}
		ids := rapid.Custom(func(t *rapid.T) string { return fmt.Sprint("i", rapid.IntRange(0, 30).Draw(t, "n")) })
		for range rapid.IntRange(0, 200).Draw(t, "steps") {
			switch id := ids.Draw(t, "id"); rapid.IntRange(0, 9).Draw(t, "what") {
			case 0:
				odd := func(id string) bool { return id[len(id)-1]%2 == 1 }
				s.keep(func(from *source) bool { return odd(from.id) })
				for id := range plain {
					if !odd(id) {
						delete(plain, id)
					}
				}
			default:
				from := s.find(id)
				last, known := plain[id]
				if (from != nil) != known || known && (from.last != last || from.id != id) {
					t.Fatalf("find(%q) is %+v; want %v, %d", id, from, known, last)
				}
				if from == nil {
					from = s.add(id, false)
				}
				from.last = last + 1
				plain[id] = last + 1
			}
			if len(s.list) != len(plain) {
				t.Fatalf("%d sources, want %d", len(s.list), len(plain))
			}
		}
	})
}
