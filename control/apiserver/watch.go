package apiserver

import (
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/control/objects"
)

// Bounds of a watch.
const (
	minWatch        = 30 * time.Minute // without timeoutSeconds a watch lasts between this and twice this, so that not all end at once
	bookmarkEvery   = 30 * time.Second // bookmarks come at most this often
	maxWatchSeconds = 24 * 60 * 60
)

// watchEvent is one line of a watch.
type watchEvent struct {
	Type   string `json:"type"`
	Object any    `json:"object"`
}

// bookmark is an object that has nothing but a resource version.
type bookmark struct {
	Kind       string       `json:"kind"`
	APIVersion string       `json:"apiVersion"`
	Metadata   bookmarkMeta `json:"metadata"`
}

type bookmarkMeta struct {
	ResourceVersion   string            `json:"resourceVersion"`
	CreationTimestamp *api.Time         `json:"creationTimestamp"`
	Annotations       map[string]string `json:"annotations,omitempty"`
}

// initialEventsEnd marks the bookmark after the objects that were there when a watch with sendInitialEvents began.
const initialEventsEnd = "k8s.io/initial-events-end"

type watchOptions struct {
	listOptions
	bookmarks bool
	initial   bool // begin with all objects that are there
	mark      bool // and say when that is done
	timeout   time.Duration
}

func parseWatchOptions(query url.Values) (watchOptions, error) {
	var o watchOptions
	var err error
	if o.listOptions, err = parseListOptions(query); err != nil {
		return o, err
	}
	o.bookmarks = isTrue(query.Get("allowWatchBookmarks"))
	o.initial = o.revision <= 0 // not given, or "0": any state will do, then all changes
	switch v := query.Get("sendInitialEvents"); {
	case v == "":
		if o.match != "" {
			return o, badRequest("resourceVersionMatch: is not allowed for a watch without sendInitialEvents")
		}
	case o.match != "NotOlderThan":
		return o, badRequest("sendInitialEvents: needs resourceVersionMatch=NotOlderThan")
	default:
		o.initial = isTrue(v)
		o.mark = o.initial && o.bookmarks
	}
	o.timeout = minWatch + rand.N(minWatch)
	if v := query.Get("timeoutSeconds"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 {
			return o, badRequest("timeoutSeconds: %q is not a whole number of at least 0", clip(v, 50))
		}
		if n > 0 {
			o.timeout = time.Duration(min(n, maxWatchSeconds)) * time.Second
		}
	}
	return o, nil
}

// watch streams changes until its time is up, the client leaves, or the server stops. After an error the last event is of type
// ERROR with a Status: 410 Expired means list again.
func (s *Server) watch(w http.ResponseWriter, r *http.Request, t target, query url.Values) error {
	f, err := accepted(r)
	if err != nil {
		return err
	}
	opts, err := parseWatchOptions(query)
	if err != nil {
		return err
	}
	inc, err := parseInclude(query)
	if err != nil {
		return err
	}
	if s.closing.Load() {
		return fail(http.StatusServiceUnavailable, reasonUnavailable, "the server is shutting down").after(1)
	}
	ctx, cancel := context.WithTimeout(r.Context(), opts.timeout)
	defer cancel()
	defer context.AfterFunc(s.closed, cancel)()

	from, known, initial, err := s.watchStart(ctx, t, opts)
	if err != nil {
		return err
	}
	out := &watchWriter{w: w, rc: http.NewResponseController(w), kind: t.kind, table: f.table, include: inc}
	if err := out.start(); err != nil {
		return nil // the client is gone; so below
	}
	for _, o := range initial {
		if out.send(objects.Added, o) != nil {
			return nil
		}
	}
	if opts.mark && out.bookmark(from, true) != nil {
		return nil
	}
	events, failed := s.store.Watch(ctx, t.kind, t.namespace, from)
	var lastMark time.Time
	for e := range events {
		if e.Type == objects.Bookmark {
			if now := time.Now(); opts.bookmarks && now.Sub(lastMark) >= bookmarkEvery {
				lastMark = now
				if out.bookmark(e.Revision, false) != nil {
					return nil
				}
			}
			continue
		}
		if typ, ok := opts.selector.event(e, known); ok && out.send(typ, e.Object) != nil {
			return nil
		}
	}
	if err := failed(); err != nil && ctx.Err() == nil {
		out.fail(fromStore(err, t.kind, ""))
	}
	return nil
}

// watchStart finds where the events begin, and what is there already.
func (s *Server) watchStart(ctx context.Context, t target, opts watchOptions) (from int64, known membership, initial []api.Object, err error) {
	ctx, cancel := context.WithTimeout(ctx, s.storeWait)
	defer cancel()
	if !opts.initial && len(opts.selector.labels) == 0 {
		now, err := s.revision(ctx)
		if err != nil {
			return 0, nil, nil, fromStore(err, t.kind, "")
		}
		if opts.revision <= 0 {
			return now, nil, nil, nil // sendInitialEvents=false and no revision: from now on
		}
		return opts.revision, nil, nil, checkRevision(opts.listOptions, now)
	}
	all, now, err := s.store.List(ctx, t.kind, t.namespace)
	if err != nil {
		return 0, nil, nil, fromStore(err, t.kind, "")
	}
	if err := checkRevision(opts.listOptions, now); err != nil {
		return 0, nil, nil, err
	}
	from = opts.revision
	if opts.initial || from <= 0 {
		from = now
	}
	known = membership{}
	for _, o := range all {
		matches := opts.selector.matches(o.Meta())
		rev, err := strconv.ParseInt(o.Meta().ResourceVersion, 10, 64)
		if err == nil && rev <= from {
			known[listKey(o)] = matches
		}
		if matches && opts.initial {
			initial = append(initial, o)
		}
	}
	if len(opts.selector.labels) == 0 {
		known = nil // names and namespaces do not change: nothing moves in or out
	}
	return from, known, initial, nil
}

// membership remembers which objects matched a label selector when they were last seen. An object that is not in it changed
// between the revision that the watch began at and the watch's own list: what it was then is not known.
type membership map[string]bool

// event turns a change into what it means for a client that sees matching objects only: an object whose labels begin to match was
// added, one whose labels stop to match was deleted. Where it is not known whether the object matched before, a deletion is sent that
// may be one too many, which clients ignore; the other mistake would leave them with an object for ever.
func (s selector) event(e objects.Event, known membership) (typ string, ok bool) {
	matches := s.matches(e.Object.Meta())
	if known == nil {
		return e.Type, matches
	}
	key := listKey(e.Object)
	before, sure := known[key]
	switch {
	case e.Type == objects.Deleted:
		delete(known, key)
		return objects.Deleted, matches || before
	case e.Type == objects.Added:
		known[key] = matches
		return objects.Added, matches
	}
	known[key] = matches
	switch {
	case matches && sure && !before:
		return objects.Added, true
	case matches:
		return objects.Modified, true
	case before || !sure:
		return objects.Deleted, true
	}
	return "", false
}

// watchWriter writes events, each at once and within a time limit: a client that does not read is cut off.
type watchWriter struct {
	w       http.ResponseWriter
	rc      *http.ResponseController
	kind    *api.Kind
	table   bool
	include include
}

// start sends the header, for which clients wait.
func (o *watchWriter) start() error {
	o.w.Header().Set("Content-Type", typeJSON)
	o.w.Header().Set("Cache-Control", "no-cache, private")
	o.w.Header().Set("X-Content-Type-Options", "nosniff")
	o.rc.SetWriteDeadline(time.Now().Add(writeTimeout))
	o.w.WriteHeader(http.StatusOK)
	return o.flush()
}

func (o *watchWriter) flush() error {
	if err := o.rc.Flush(); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	return nil
}

func (o *watchWriter) write(e watchEvent) error {
	data, err := json.Marshal(e)
	if err != nil {
		return err
	}
	o.rc.SetWriteDeadline(time.Now().Add(writeTimeout)) // where it is not supported there is nothing to cut
	if _, err := o.w.Write(append(data, '\n')); err != nil {
		return err
	}
	return o.flush()
}

func (o *watchWriter) send(typ string, obj api.Object) error {
	if o.table {
		return o.write(watchEvent{typ, newTable(o.kind, listMeta{ResourceVersion: obj.Meta().ResourceVersion}, []api.Object{obj}, o.include)})
	}
	return o.write(watchEvent{typ, obj})
}

func (o *watchWriter) bookmark(rev int64, initialEnd bool) error {
	if o.table {
		return o.write(watchEvent{objects.Bookmark, newTable(o.kind, listMeta{ResourceVersion: formatRevision(rev)}, nil, o.include)})
	}
	b := bookmark{o.kind.Kind, o.kind.APIVersion, bookmarkMeta{ResourceVersion: formatRevision(rev)}}
	if initialEnd {
		b.Metadata.Annotations = map[string]string{initialEventsEnd: "true"}
	}
	return o.write(watchEvent{objects.Bookmark, b})
}

func (o *watchWriter) fail(err error) error {
	return o.write(watchEvent{"ERROR", statusOf(err)})
}

// watchNothing is a watch of a resource of which there are none.
func (s *Server) watchNothing(w http.ResponseWriter, r *http.Request, query url.Values) error {
	opts, err := parseWatchOptions(url.Values{"timeoutSeconds": query["timeoutSeconds"]})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(r.Context(), opts.timeout)
	defer cancel()
	defer context.AfterFunc(s.closed, cancel)()
	out := &watchWriter{w: w, rc: http.NewResponseController(w)}
	if out.start() == nil {
		<-ctx.Done()
	}
	return nil
}
