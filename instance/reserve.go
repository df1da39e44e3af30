package instance

import (
	"time"

	"github.com/thawrun/thaw/api"
)

// reservation is how many instances of a revision may be needed at once.
type reservation struct {
	n     int
	until time.Time
}

// Reserve says that until then n instances of a revision may be needed at once: what can be made ahead of them (places, interpreters) is kept
// ready in that number, within the bounds of the node, and made when nothing else is being started. The largest number that still holds
// counts. An unknown revision is ignored.
func (a *Agent) Reserve(id api.RevisionID, n int, until time.Time) {
	now := time.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	r := a.revisions[id]
	if r == nil || r.removed || n <= 0 || !until.After(now) {
		return
	}
	if old := a.reserved[r]; n >= old.n || now.After(old.until) {
		a.reserved[r] = reservation{n, until}
		a.sizePoolsLocked(now)
	}
}

// speakLocked notes what language a revision is written in; "" = it needs no interpreter, or is removed.
func (a *Agent) speakLocked(r *revision, language string) {
	if r.language == language {
		return
	}
	if a.languages[r.language]--; a.languages[r.language] <= 0 {
		delete(a.languages, r.language)
	}
	if r.language = language; language != "" {
		a.languages[language]++
	}
	a.sizePoolsLocked(time.Now())
}

// sizePoolsLocked says how much is kept ready: of what any instance needs, and of what one of a language needs, for the reservations that
// hold, and a few more. It looks at revisions with a reservation only: those that took a step up lately.
func (a *Agent) sizePoolsLocked(now time.Time) {
	places := berthsAhead
	languages := map[string]int{}
	for language := range a.languages {
		languages[language] = blanksAhead
	}
	// The revisions of one service follow each other: only one of them takes the next step up.
	type service struct{ namespace, name, language string }
	most := map[service]int{}
	for r, v := range a.reserved {
		if now.After(v.until) {
			delete(a.reserved, r)
			continue
		}
		s := service{name: string(r.id), language: r.language}
		if r.plan != nil && r.plan.rev.ServiceName() != "" {
			s.namespace, s.name = r.plan.rev.Namespace, r.plan.rev.ServiceName()
		}
		most[s] = max(most[s], v.n)
	}
	for s, n := range most {
		if languages[s.language] > 0 {
			languages[s.language] = min(languages[s.language]+n, blanksMost)
		} else {
			places = min(places+n, berthsMost)
		}
	}
	a.berths.want(places)
	a.blanks.want(languages)
}

// resizePeriod is how often reservations that are over are noticed.
const resizePeriod = time.Minute
