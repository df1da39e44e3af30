package reconcile

import (
	"encoding/json"
	"math"
	"slices"
	"time"
)

// rollout is the state of the gradual rollouts of one route: what a route's status annotation holds while there is one.
type rollout struct {
	Configurations []share `json:"configurations"`
}

// share is one traffic target that follows the latest revision of a configuration, and how its percentage is spread over
// that configuration's revisions at the moment.
type share struct {
	Configuration string `json:"configurationName"`
	Tag           string `json:"tag,omitempty"`
	Percent       int    `json:"percent"` // of the route; the sum of the parts
	// Parts is oldest first; the last one is where all of it is going.
	Parts []part `json:"revisions"`

	// The schedule. Start is when the last revision joined (Unix nanoseconds); the others are 0 until the first 1 % is known
	// to be served.
	Start    int64 `json:"startTime,omitempty"`
	Next     int64 `json:"nextStepTime,omitempty"` // Unix nanoseconds
	Interval int64 `json:"stepDuration,omitempty"` // nanoseconds
	Size     int   `json:"stepSize,omitempty"`     // percent
}

type part struct {
	Revision string `json:"revisionName"`
	Percent  int    `json:"percent"`
}

// moving says whether more than one revision has a part.
func (s *share) moving() bool { return len(s.Parts) > 1 }

// smallestRollout is the percentage below which a new revision takes everything at once: there is nothing to divide.
const smallestRollout = 2

// roll returns how percent of a target is to be spread now that latest is the configuration's latest ready revision.
// prev is what roll returned before (nil: nothing was served yet). duration 0 means at once. Pure.
//
// The rules are Knative's (pkg/reconciler/route/traffic/rollout.go): a new revision gets 1 % at once, taken from the newest
// of the old ones; then it grows in equal steps (see schedule), each of which drains the newest of the old ones first.
func roll(prev *share, s share, latest string, duration time.Duration, now time.Time) share {
	jump := func() share {
		s.Parts = []part{{latest, s.Percent}}
		s.Start, s.Next, s.Interval, s.Size = 0, 0, 0, 0
		return s
	}
	if prev == nil || len(prev.Parts) == 0 || duration <= 0 || s.Percent < smallestRollout {
		return jump()
	}
	parts := resize(prev.Parts, prev.Percent, s.Percent)
	if len(parts) == 0 {
		return jump()
	}
	s.Start, s.Next, s.Interval, s.Size = prev.Start, prev.Next, prev.Interval, prev.Size
	if parts[len(parts)-1].Revision == latest {
		s.Parts = parts
		if s.moving() {
			s.step(now)
		}
		if !s.moving() {
			return jump()
		}
		return s
	}

	// A new revision, or an older one that is the latest again: then it keeps what it still has.
	has := 0
	parts = slices.DeleteFunc(parts, func(p part) bool {
		if p.Revision == latest {
			has = p.Percent
		}
		return p.Revision == latest
	})
	if len(parts) == 0 {
		return jump()
	}
	if has == 0 {
		has = 1
		parts = take(parts, 1)
	}
	s.Parts = append(parts, part{latest, has})
	s.Start, s.Next, s.Interval, s.Size = now.UnixNano(), 0, 0, 0
	if !s.moving() {
		return jump()
	}
	return s
}

// take removes n percent, from the newest part first, and drops parts that have nothing left.
func take(parts []part, n int) []part {
	parts = slices.Clone(parts)
	for i := len(parts) - 1; i >= 0 && n > 0; i-- {
		d := min(n, parts[i].Percent)
		parts[i].Percent -= d
		n -= d
	}
	return slices.DeleteFunc(parts, func(p part) bool { return p.Percent == 0 })
}

// resize fits the parts to a changed percentage of the target: what is added goes to the newest revision, what is taken
// away is taken from the oldest first.
func resize(parts []part, was, now int) []part {
	parts = slices.Clone(parts)
	if now >= was {
		parts[len(parts)-1].Percent += now - was
		return parts
	}
	n := was - now
	for i := range parts {
		d := min(n, parts[i].Percent)
		parts[i].Percent -= d
		n -= d
	}
	return slices.DeleteFunc(parts, func(p part) bool { return p.Percent == 0 })
}

// step moves one step's worth of traffic to the last revision if its time has come.
func (s *share) step(now time.Time) {
	if s.Next == 0 {
		return // not scheduled yet
	}
	if s.Next-now.UnixNano() > s.Interval { // the clock was set back: do not wait for a time that is far away
		s.Next = now.UnixNano() + s.Interval
	}
	if now.UnixNano() < s.Next {
		return
	}
	last := s.Parts[len(s.Parts)-1]
	old := take(s.Parts[:len(s.Parts)-1], s.Size)
	last.Percent = s.Percent
	for _, p := range old {
		last.Percent -= p.Percent
	}
	s.Parts = append(old, last)
	// From now, not from when it was due: after a pause or a jump of the clock the rollout goes on gradually.
	s.Next = now.UnixNano() + s.Interval
}

// schedule computes the steps once the first percent is known to be served; before, and later, it does nothing. m is how
// many whole seconds that took, at least one; the rest of the duration is divided into steps of at least m seconds and at
// least 1 %.
func (s *share) schedule(duration time.Duration, now time.Time) {
	if !s.moving() || s.Start == 0 || s.Interval != 0 {
		return
	}
	m := math.Max(1, math.Ceil(now.Sub(time.Unix(0, s.Start)).Seconds()))
	rest := math.Max(1, math.Floor(duration.Seconds())-m)
	all := float64(s.Percent - 1)
	steps := math.Min(all, math.Max(1, rest/m))
	s.Size = int(math.Round(all / steps))
	s.Interval = int64(rest / steps * float64(time.Second))
	s.Next = now.UnixNano() + s.Interval
}

// wait returns how long it is until the next step; ok is false if there is none.
func (r rollout) wait(now time.Time) (d time.Duration, ok bool) {
	for i := range r.Configurations {
		s := &r.Configurations[i]
		if !s.moving() || s.Next == 0 {
			continue
		}
		if w := time.Duration(s.Next - now.UnixNano()); !ok || w < d {
			d, ok = w, true
		}
	}
	return d, ok
}

// moving says whether any target has a rollout under way.
func (r rollout) moving() bool {
	return slices.ContainsFunc(r.Configurations, func(s share) bool { return s.moving() })
}

// find returns the state of a target, nil if there is none.
func (r rollout) find(configuration, tag string) *share {
	for i := range r.Configurations {
		if s := &r.Configurations[i]; s.Configuration == configuration && s.Tag == tag {
			return s
		}
	}
	return nil
}

// parseRollout reads what String wrote; anything else reads as no rollout, which ends one that was under way.
func parseRollout(text string) rollout {
	var r rollout
	if text == "" || json.Unmarshal([]byte(text), &r) != nil {
		return rollout{}
	}
	for _, s := range r.Configurations {
		sum := 0
		for _, p := range s.Parts {
			if p.Percent <= 0 || p.Percent > 100 || p.Revision == "" {
				return rollout{}
			}
			sum += p.Percent
		}
		if sum != s.Percent {
			return rollout{}
		}
	}
	return r
}

func (r rollout) String() string {
	b, _ := json.Marshal(r) // plain strings and numbers: cannot fail
	return string(b)
}
