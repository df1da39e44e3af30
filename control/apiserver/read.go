package apiserver

import (
	"cmp"
	"context"
	"encoding/base64"
	"encoding/json"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"

	"github.com/thawrun/thaw/api"
)

// listMeta is the metadata of a list.
type listMeta struct {
	ResourceVersion    string `json:"resourceVersion"`
	Continue           string `json:"continue,omitempty"`
	RemainingItemCount *int64 `json:"remainingItemCount,omitempty"`
}

// objectList is a list of any kind.
type objectList struct {
	Kind       string       `json:"kind"`
	APIVersion string       `json:"apiVersion"`
	Metadata   listMeta     `json:"metadata"`
	Items      []api.Object `json:"items"`
}

func newList(k *api.Kind, meta listMeta, items []api.Object) *objectList {
	if items == nil {
		items = []api.Object{}
	}
	return &objectList{Kind: k.Kind + "List", APIVersion: k.APIVersion, Metadata: meta, Items: items}
}

// get answers one object, or a table of it.
func (s *Server) get(ctx context.Context, w http.ResponseWriter, r *http.Request, t target) error {
	f, err := accepted(r)
	if err != nil {
		return err
	}
	o, err := s.store.Get(ctx, t.kind, t.namespace, t.name)
	if err != nil {
		return fromStore(err, t.kind, t.name)
	}
	return s.answer(w, r, f, t.kind, http.StatusOK, o)
}

// answer writes one object in the form that was asked for.
func (s *Server) answer(w http.ResponseWriter, r *http.Request, f form, k *api.Kind, code int, o api.Object) error {
	if !f.table {
		respond(w, r, f, code, o)
		return nil
	}
	inc, err := parseInclude(r.URL.Query())
	if err != nil {
		return err
	}
	respond(w, r, f, code, newTable(k, listMeta{ResourceVersion: o.Meta().ResourceVersion}, []api.Object{o}, inc))
	return nil
}

// listOptions are the parts of a query that lists and watches share.
type listOptions struct {
	selector selector
	limit    int
	from     continueToken
	revision int64  // of resourceVersion; -1 = not given
	match    string // resourceVersionMatch
}

func parseListOptions(query url.Values) (listOptions, error) {
	o := listOptions{revision: -1, match: query.Get("resourceVersionMatch")}
	var err error
	if o.selector, err = parseSelector(query.Get("labelSelector"), query.Get("fieldSelector")); err != nil {
		return o, err
	}
	if v := query.Get("limit"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 {
			return o, badRequest("limit: %q is not a whole number of at least 0", clip(v, 50))
		}
		o.limit = int(min(n, 1<<30))
	}
	if v := query.Get("continue"); v != "" {
		if o.from, err = decodeContinue(v); err != nil {
			return o, err
		}
	}
	if v := query.Get("resourceVersion"); v != "" {
		n, err := strconv.ParseInt(v, 10, 64)
		if err != nil || n < 0 {
			return o, badRequest("resourceVersion: %q is not one that this server gave", clip(v, 50))
		}
		o.revision = n
	}
	switch o.match {
	case "":
	case "NotOlderThan", "Exact":
		if o.revision < 0 {
			return o, badRequest("resourceVersionMatch: %s needs a resourceVersion", o.match)
		}
		if o.match == "Exact" && o.revision == 0 {
			return o, badRequest(`resourceVersionMatch: Exact needs a resourceVersion other than "0"`)
		}
	default:
		return o, badRequest("resourceVersionMatch: %q is neither NotOlderThan nor Exact", clip(o.match, 50))
	}
	if o.from.Start != "" && o.revision > 0 {
		return o, badRequest("specifying resource version is not allowed when using continue")
	}
	return o, nil
}

// continueToken says where a list goes on. Each page shows the store as it is when the page is asked for, but every page
// carries the resource version of the first one: whoever watches from there hears of all that changed between the pages,
// some of it twice.
type continueToken struct {
	Version  string `json:"v"`
	Revision int64  `json:"rv"`
	Start    string `json:"start"` // namespace/name of the last object of the page before
}

const continueVersion = "thaw.run/v1"

func (t continueToken) encode() string {
	t.Version = continueVersion
	data, _ := json.Marshal(t)
	return base64.RawURLEncoding.EncodeToString(data)
}

func decodeContinue(s string) (continueToken, error) {
	var t continueToken
	data, err := base64.RawURLEncoding.DecodeString(s)
	if err == nil {
		err = json.Unmarshal(data, &t)
	}
	if err != nil || t.Version != continueVersion || t.Start == "" || t.Revision <= 0 {
		return continueToken{}, badRequest("continue key is not valid: it is not one that this server gave")
	}
	return t, nil
}

// list answers a collection, in pages if a limit is given.
func (s *Server) list(ctx context.Context, w http.ResponseWriter, r *http.Request, t target, query url.Values) error {
	f, err := accepted(r)
	if err != nil {
		return err
	}
	opts, err := parseListOptions(query)
	if err != nil {
		return err
	}
	inc, err := parseInclude(query)
	if err != nil {
		return err
	}
	items, meta, err := s.page(ctx, t, opts)
	if err != nil {
		return err
	}
	if f.table {
		respond(w, r, f, http.StatusOK, newTable(t.kind, meta, items, inc))
		return nil
	}
	respond(w, r, f, http.StatusOK, newList(t.kind, meta, items))
	return nil
}

// page reads what one answer shows.
func (s *Server) page(ctx context.Context, t target, opts listOptions) ([]api.Object, listMeta, error) {
	all, rev, err := s.store.List(ctx, t.kind, t.namespace)
	if err != nil {
		return nil, listMeta{}, fromStore(err, t.kind, "")
	}
	if err := checkRevision(opts, rev); err != nil {
		return nil, listMeta{}, err
	}
	if opts.from.Revision > 0 {
		rev = opts.from.Revision
	}
	byKey := func(a, b api.Object) int { return cmp.Compare(listKey(a), listKey(b)) }
	if !slices.IsSortedFunc(all, byKey) {
		slices.SortFunc(all, byKey)
	}
	items := make([]api.Object, 0, len(all))
	for _, o := range all {
		if opts.selector.matches(o.Meta()) && (opts.from.Start == "" || listKey(o) > opts.from.Start) {
			items = append(items, o)
		}
	}
	meta := listMeta{ResourceVersion: formatRevision(rev)}
	if opts.limit > 0 && len(items) > opts.limit {
		rest := int64(len(items) - opts.limit)
		items = items[:opts.limit]
		meta.Continue = continueToken{Revision: rev, Start: listKey(items[len(items)-1])}.encode()
		if opts.selector.empty() {
			meta.RemainingItemCount = &rest
		}
	}
	return items, meta, nil
}

// listKey orders objects in lists.
func listKey(o api.Object) string {
	m := o.Meta()
	return m.Namespace + "/" + m.Name
}

// checkRevision compares the revision that a client asks for with the store's. A client that knows a later one talked
// to another store (a data directory that was wiped): it must start over and not wait for a revision that means something else.
func checkRevision(opts listOptions, now int64) error {
	switch {
	case opts.revision > now:
		e := fail(http.StatusGatewayTimeout, reasonTimeout, "Too large resource version: %d, current: %d", opts.revision, now).after(1)
		e.s.Details.Causes = []statusCause{{Reason: "ResourceVersionTooLarge", Message: "Too large resource version"}}
		return e
	case opts.match == "Exact" && opts.revision != now:
		return expired("the state at resourceVersion %d is gone: only the newest state can be listed", opts.revision)
	}
	return nil
}

// namespaces are all that objects are in, sorted.
func (s *Server) namespaces(ctx context.Context) ([]string, int64, error) {
	seen := map[string]bool{"default": true}
	var rev int64
	for _, k := range api.Kinds {
		list, at, err := s.store.List(ctx, k, "")
		if err != nil {
			return nil, 0, fromStore(err, k, "")
		}
		rev = max(rev, at)
		for _, o := range list {
			seen[o.Meta().Namespace] = true
		}
	}
	names := make([]string, 0, len(seen))
	for n := range seen {
		names = append(names, n)
	}
	slices.SortFunc(names, strings.Compare)
	return names, rev, nil
}
