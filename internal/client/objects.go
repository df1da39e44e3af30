package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/thawrun/thaw/api"
)

// PatchType is the media type of a patch.
type PatchType string

// The patches that the API takes.
const (
	JSONPatch  PatchType = "application/json-patch+json"  // RFC 6902
	MergePatch PatchType = "application/merge-patch+json" // RFC 7386
	ApplyPatch PatchType = "application/apply-patch+yaml" // server-side apply: create or merge
	jsonType             = "application/json"
)

// Get reads one object.
func (c *Client) Get(ctx context.Context, k *api.Kind, ns, name string) (api.Object, error) {
	_, body, err := c.do(ctx, request{method: http.MethodGet, path: item(k, ns, name)})
	if err != nil {
		return nil, err
	}
	return decode(k, body)
}

// GetRaw reads one object as the server sent it, with fields that this client does not know.
func (c *Client) GetRaw(ctx context.Context, k *api.Kind, ns, name string) ([]byte, error) {
	_, body, err := c.do(ctx, request{method: http.MethodGet, path: item(k, ns, name)})
	return body, err
}

// ListOptions narrow a list.
type ListOptions struct {
	LabelSelector string
	FieldSelector string
}

func (o ListOptions) query() url.Values {
	q := url.Values{}
	if o.LabelSelector != "" {
		q.Set("labelSelector", o.LabelSelector)
	}
	if o.FieldSelector != "" {
		q.Set("fieldSelector", o.FieldSelector)
	}
	return q
}

// List reads all objects of a kind in a namespace ("" = in all), and the resource version that a watch can go on from.
func (c *Client) List(ctx context.Context, k *api.Kind, ns string, o ListOptions) ([]api.Object, string, error) {
	body, err := c.ListRaw(ctx, k, ns, o)
	if err != nil {
		return nil, "", err
	}
	var list struct {
		Metadata struct {
			ResourceVersion string `json:"resourceVersion"`
		} `json:"metadata"`
		Items []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, "", fmt.Errorf("read the server's list of %s: %w", k.Plural, err)
	}
	objects := make([]api.Object, 0, len(list.Items))
	for _, raw := range list.Items {
		o, err := decode(k, raw)
		if err != nil {
			return nil, "", err
		}
		objects = append(objects, o)
	}
	return objects, list.Metadata.ResourceVersion, nil
}

// ListRaw is List as the server sent it.
func (c *Client) ListRaw(ctx context.Context, k *api.Kind, ns string, o ListOptions) ([]byte, error) {
	_, body, err := c.do(ctx, request{method: http.MethodGet, path: collection(k, ns), query: o.query()})
	return body, err
}

// Create makes an object; ErrAlreadyExists if its name is taken.
func (c *Client) Create(ctx context.Context, k *api.Kind, o api.Object) (api.Object, error) {
	return c.write(ctx, http.MethodPost, k, collection(k, o.Meta().Namespace), o)
}

// Replace writes an object in the place of the one with its name; ErrConflict if that is no longer of o's resource version.
func (c *Client) Replace(ctx context.Context, k *api.Kind, o api.Object) (api.Object, error) {
	return c.write(ctx, http.MethodPut, k, item(k, o.Meta().Namespace, o.Meta().Name), o)
}

func (c *Client) write(ctx context.Context, method string, k *api.Kind, path string, o api.Object) (api.Object, error) {
	*o.Type() = api.TypeMeta{Kind: k.Kind, APIVersion: k.APIVersion}
	data, err := json.Marshal(o)
	if err != nil {
		return nil, err
	}
	q := url.Values{"fieldManager": {c.agent}}
	_, body, err := c.do(ctx, request{method: method, path: path, query: q, contentType: jsonType, body: bytes.NewReader(data)})
	if err != nil {
		return nil, err
	}
	return decode(k, body)
}

// Patch changes an object.
func (c *Client) Patch(ctx context.Context, k *api.Kind, ns, name string, typ PatchType, patch []byte) (api.Object, error) {
	o, _, err := c.patch(ctx, k, ns, name, typ, patch)
	return o, err
}

func (c *Client) patch(ctx context.Context, k *api.Kind, ns, name string, typ PatchType, patch []byte) (api.Object, int, error) {
	q := url.Values{"fieldManager": {c.agent}}
	if typ == ApplyPatch {
		q.Set("force", "true")
	}
	code, body, err := c.do(ctx, request{
		method: http.MethodPatch, path: item(k, ns, name), query: q, contentType: string(typ), body: bytes.NewReader(patch),
	})
	if err != nil {
		return nil, 0, err
	}
	o, err := decode(k, body)
	return o, code, err
}

// Outcome says what an apply did.
type Outcome string

// The outcomes of Apply, in kubectl's words.
const (
	Created    Outcome = "created"
	Configured Outcome = "configured"
	Unchanged  Outcome = "unchanged"
)

// Apply makes an object or merges into it what data (its JSON or YAML) says, and tells which. "Unchanged" means that nobody
// will notice: neither spec nor labels nor annotations differ from before; a status that moved meanwhile does not count.
func (c *Client) Apply(ctx context.Context, k *api.Kind, ns, name string, data []byte) (api.Object, Outcome, error) {
	before, err := c.Get(ctx, k, ns, name)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return nil, "", err
	}
	after, code, err := c.patch(ctx, k, ns, name, ApplyPatch, data)
	if err != nil {
		return nil, "", err
	}
	if code == http.StatusCreated || before == nil {
		return after, Created, nil
	}
	return after, Compare(before, after), nil
}

// Compare tells whether a write changed an object in a way that people care for.
func Compare(before, after api.Object) Outcome {
	b, a := before.Meta(), after.Meta()
	if b.UID != a.UID {
		return Created
	}
	// The server stamps who wrote last even if nothing else differs: not a change.
	if b.Generation == a.Generation && maps.Equal(b.Labels, a.Labels) && maps.Equal(plain(b.Annotations), plain(a.Annotations)) {
		return Unchanged
	}
	return Configured
}

func plain(annotations map[string]string) map[string]string {
	m := maps.Clone(annotations)
	delete(m, api.AnnotationLastModifier)
	return m
}

// Delete removes an object; ErrNotFound if there is none. What it owns is removed after it.
func (c *Client) Delete(ctx context.Context, k *api.Kind, ns, name string) error {
	_, _, err := c.do(ctx, request{method: http.MethodDelete, path: item(k, ns, name)})
	return err
}

// Event is one change that a watch saw.
type Event struct {
	Type   string // ADDED, MODIFIED, DELETED, BOOKMARK
	Object api.Object
}

// WatchOptions narrow a watch.
type WatchOptions struct {
	ListOptions
	ResourceVersion string        // go on after this version; "" = begin with what is there
	Timeout         time.Duration // the server ends the watch after it; 0 = when the server likes
	Bookmarks       bool
}

// Watch yields changes until ctx ends, the server ends the stream, or an error, which is yielded last: ErrExpired means
// that a fresh list is needed.
func (c *Client) Watch(ctx context.Context, k *api.Kind, ns string, o WatchOptions) iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		q := o.query()
		q.Set("watch", "true")
		if o.ResourceVersion != "" {
			q.Set("resourceVersion", o.ResourceVersion)
		}
		if o.Timeout > 0 {
			q.Set("timeoutSeconds", strconv.Itoa(max(1, int(o.Timeout/time.Second))))
		}
		if o.Bookmarks {
			q.Set("allowWatchBookmarks", "true")
		}
		resp, err := c.stream(ctx, request{method: http.MethodGet, path: collection(k, ns), query: q})
		if err != nil {
			yield(Event{}, err)
			return
		}
		defer resp.Body.Close()
		for dec := json.NewDecoder(resp.Body); ; {
			var wire struct {
				Type   string          `json:"type"`
				Object json.RawMessage `json:"object"`
			}
			if err := dec.Decode(&wire); err != nil {
				if !errors.Is(err, io.EOF) {
					yield(Event{}, c.explain(ctx, err))
				}
				return
			}
			if wire.Type == "ERROR" {
				var s status
				if err := json.Unmarshal(wire.Object, &s); err != nil {
					yield(Event{}, fmt.Errorf("read the error that ended the watch: %w", err))
					return
				}
				yield(Event{}, s.err(s.Code))
				return
			}
			obj, err := decode(k, wire.Object)
			if !yield(Event{Type: wire.Type, Object: obj}, err) || err != nil {
				return
			}
		}
	}
}

// KindOf finds the kind of a document by its apiVersion and kind.
func KindOf(apiVersion, kind string) (*api.Kind, error) {
	var known []string
	for _, k := range api.Kinds {
		if k.APIVersion == apiVersion && k.Kind == kind {
			return k, nil
		}
		known = append(known, k.APIVersion+" "+k.Kind)
	}
	return nil, fmt.Errorf("no kind %q in %q; known are %s", kind, apiVersion, strings.Join(known, ", "))
}
