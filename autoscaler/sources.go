package autoscaler

import (
	"math"
	"slices"
)

// source is who reports: an instance of the last snapshot, or an activator.
type source struct {
	id        string
	last      int64 // time of its last report, ns since the origin of the windows; minReport = none
	seen      bool  // in the snapshot that is being taken over
	activator bool
}

const minReport = math.MinInt64

// sources are the reporters of one revision. Reports come in much the same order each second, so the next one is looked for behind the
// last one; most revisions have one or two, and need no index.
type sources struct {
	list  []source
	index map[string]int32 // from the id to its place in list; nil while there are few
	next  int              // where the next report's source is expected
}

// fewSources is how many are looked through one by one.
const fewSources = 8

// find is the source of that name, nil when there is none. It is valid until the next add or keep.
func (s *sources) find(id string) *source {
	if s.next >= len(s.list) {
		s.next = 0
	}
	at := -1
	switch {
	case s.next < len(s.list) && s.list[s.next].id == id:
		at = s.next
	case s.index != nil:
		if i, ok := s.index[id]; ok {
			at = int(i)
		}
	default:
		at = slices.IndexFunc(s.list, func(from source) bool { return from.id == id })
	}
	if at < 0 {
		return nil
	}
	s.next = at + 1
	return &s.list[at]
}

// add makes a source that find does not know, and has never reported.
func (s *sources) add(id string, activator bool) *source {
	s.list = append(s.list, source{id: id, last: minReport, activator: activator})
	switch {
	case s.index != nil:
		s.index[id] = int32(len(s.list) - 1)
	case len(s.list) > fewSources:
		s.reindex()
	}
	return &s.list[len(s.list)-1]
}

// keep forgets all sources but those that ok says yes to.
func (s *sources) keep(ok func(*source) bool) {
	before := len(s.list)
	s.list = slices.DeleteFunc(s.list, func(from source) bool { return !ok(&from) })
	if len(s.list) < before {
		s.reindex()
	}
}

func (s *sources) reindex() {
	s.index = nil
	if len(s.list) <= fewSources {
		return
	}
	s.index = make(map[string]int32, len(s.list))
	for i := range s.list {
		s.index[s.list[i].id] = int32(i)
	}
}
