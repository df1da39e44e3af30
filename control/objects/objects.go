// Package objects keeps api objects in a state store with the rules that Kubernetes clients expect: names, uids, generations,
// resource versions that are compared, status that is written apart from spec, and watches that begin where a list ended. It
// promises that nothing is written when nothing changed, so that reconcilers may write what they think is right as often
// as they like. It does not default, validate, filter by label, honour finalizers or collect garbage: its callers do.
package objects

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/state"
)

// What callers branch on, besides the errors of package state.
var (
	// ErrBadName means a namespace or a name that cannot be part of a key.
	ErrBadName = errors.New("objects: bad name")
	// ErrCorrupt means that the store holds something under an object's key that is not that object.
	ErrCorrupt = errors.New("objects: stored object cannot be read")
)

const (
	root = "/thaw/objects/"
	// maxSegment bounds a namespace and a name, in bytes; Kubernetes allows 253.
	maxSegment = 253
	// maxGenerated is what is kept of a generateName, so that the name with its suffix stays a DNS label.
	maxGenerated = 63 - suffixLength
	suffixLength = 5
	// generateTries bounds the search for a free generated name: 32^5 names make a second try rare already.
	generateTries = 8
)

// Store is the typed view of a state store. It has no state of its own and may be used concurrently.
//
// Objects given to it are not changed and not kept; objects it returns belong to the caller.
type Store struct {
	state state.Store
	now   func() time.Time
}

// New returns the typed view of s; now stamps creation times.
func New(s state.Store, now func() time.Time) *Store {
	return &Store{state: s, now: now}
}

// Prefix is the beginning of the keys of all objects of a kind in a namespace ("" = in all of them).
func Prefix(k *api.Kind, namespace string) string {
	group, _, _ := strings.Cut(k.APIVersion, "/")
	p := root + group + "/" + k.Plural + "/"
	if namespace != "" {
		p += namespace + "/"
	}
	return p
}

// key is where an object lives, or ErrBadName.
func key(k *api.Kind, namespace, name string) (string, error) {
	if err := checkSegment("namespace", namespace); err != nil {
		return "", err
	}
	if err := checkSegment("name", name); err != nil {
		return "", err
	}
	return Prefix(k, namespace) + name, nil
}

// checkSegment refuses what would escape its place in a key. Whether a name is one that Kubernetes takes is the validation's question.
func checkSegment(what, s string) error {
	switch {
	case s == "":
		return fmt.Errorf("%w: the %s is empty", ErrBadName, what)
	case s == "." || s == "..":
		return fmt.Errorf("%w: the %s is %q", ErrBadName, what, s)
	case len(s) > maxSegment:
		return fmt.Errorf("%w: the %s has %d bytes, at most %d are taken", ErrBadName, what, len(s), maxSegment)
	case !utf8.ValidString(s) || strings.ContainsFunc(s, func(r rune) bool { return r == '/' || unicode.IsControl(r) }):
		return fmt.Errorf("%w: the %s %q has a slash, a control character or broken UTF-8", ErrBadName, what, s)
	}
	return nil
}

// Get returns one object, or state.ErrNotFound.
func (s *Store) Get(ctx context.Context, k *api.Kind, namespace, name string) (api.Object, error) {
	r, err := s.read(ctx, k, namespace, name)
	if err != nil {
		return nil, err
	}
	return r.object, nil
}

// List returns the objects of a kind in a namespace ("" = in all), sorted by namespace and name, and the revision of the store that the
// picture is of: a Watch from there misses nothing.
func (s *Store) List(ctx context.Context, k *api.Kind, namespace string) ([]api.Object, int64, error) {
	if namespace != "" {
		if err := checkSegment("namespace", namespace); err != nil {
			return nil, 0, err
		}
	}
	kvs, rev, err := s.state.List(ctx, Prefix(k, namespace))
	if err != nil {
		return nil, 0, fmt.Errorf("list %s: %w", k.Plural, err)
	}
	objects := make([]api.Object, len(kvs))
	for i, kv := range kvs {
		if objects[i], err = decode(k, kv); err != nil {
			return nil, 0, err
		}
	}
	return objects, rev, nil
}

// Create stores a new object and returns it with what the store fills in: kind and apiVersion, uid, creationTimestamp,
// generation 1, the name if only generateName is given. A status is not taken: only UpdateStatus writes one. state.ErrExists
// if the name is in use.
func (s *Store) Create(ctx context.Context, k *api.Kind, o api.Object) (api.Object, error) {
	if given := o.Meta(); given.Name != "" || given.GenerateName == "" {
		if _, err := key(k, given.Namespace, given.Name); err != nil { // before JSON mends broken UTF-8
			return nil, fmt.Errorf("create %s: %w", k.Singular, err)
		}
	}
	d, err := newDocument(o)
	if err != nil {
		return nil, err
	}
	d.setStatus(nil)
	n, err := d.object(k)
	if err != nil {
		return nil, err
	}
	m := n.Meta()
	m.UID = newUID()
	m.CreationTimestamp = &api.Time{Time: s.now().UTC().Truncate(time.Second)}
	m.DeletionTimestamp = nil
	m.Generation = 1
	generated := m.Name == "" && m.GenerateName != ""
	for try := 1; ; try++ {
		if generated {
			m.Name = generateName(m.GenerateName)
		}
		err = s.write(ctx, k, n, 0)
		if !generated || try == generateTries || !errors.Is(err, state.ErrExists) {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("create %s %s/%s: %w", k.Singular, m.Namespace, m.Name, err)
	}
	return n, nil
}

// Update replaces metadata and spec of a stored object and returns what is stored then. The stored status, uid and
// creationTimestamp stay; generation grows by one if the spec changed. A resourceVersion that is not the stored one, or
// another uid, is state.ErrConflict; without resourceVersion the object is replaced whatever it was. If nothing changes nothing is
// written.
func (s *Store) Update(ctx context.Context, k *api.Kind, o api.Object) (api.Object, error) {
	d, err := newDocument(o)
	if err != nil {
		return nil, err
	}
	return s.change(ctx, k, "update", o, func(stored *document) (api.Object, error) {
		d.setStatus(stored.status())
		n, err := d.object(k)
		if err != nil {
			return nil, err
		}
		old, err := stored.object(k)
		if err != nil {
			return nil, err
		}
		m, was := n.Meta(), old.Meta()
		m.UID, m.CreationTimestamp, m.DeletionTimestamp, m.Generation = was.UID, was.CreationTimestamp, was.DeletionTimestamp, was.Generation
		after, err := newDocument(n)
		if err != nil {
			return nil, err
		}
		if !after.sameSpec(stored) {
			m.Generation++
		}
		return n, nil
	})
}

// UpdateStatus writes the status of o and nothing else, under the rules of Update.
func (s *Store) UpdateStatus(ctx context.Context, k *api.Kind, o api.Object) (api.Object, error) {
	d, err := newDocument(o)
	if err != nil {
		return nil, err
	}
	return s.change(ctx, k, "update status of", o, func(stored *document) (api.Object, error) {
		n := stored.clone()
		n.setStatus(d.status())
		return n.object(k)
	})
}

// change is the read-compare-write of both updates: modify makes the new object out of the stored one.
func (s *Store) change(ctx context.Context, k *api.Kind, verb string, o api.Object, modify func(*document) (api.Object, error)) (api.Object, error) {
	want := o.Meta()
	fail := func(err error) (api.Object, error) {
		return nil, fmt.Errorf("%s %s %s/%s: %w", verb, k.Singular, want.Namespace, want.Name, err)
	}
	for {
		r, err := s.read(ctx, k, want.Namespace, want.Name)
		if err != nil {
			return fail(err)
		}
		if err := r.expect(want.UID, want.ResourceVersion); err != nil {
			return fail(err)
		}
		stored, err := newDocument(r.object)
		if err != nil {
			return fail(err)
		}
		n, err := modify(stored)
		if err != nil {
			return fail(err)
		}
		n.Meta().ResourceVersion = r.object.Meta().ResourceVersion // is not part of the comparison
		after, err := newDocument(n)
		if err != nil {
			return fail(err)
		}
		if after.equal(stored) {
			return r.object, nil
		}
		err = s.write(ctx, k, n, r.revision)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, state.ErrConflict) && want.ResourceVersion == "":
			// somebody else was faster, and the caller does not mind
		default:
			return fail(err)
		}
	}
}

// Delete removes an object and returns its last form, with the revision of the deletion as resourceVersion. A uid or
// resourceVersion that is given and differs is state.ErrConflict. What the object owns stays: the reconcilers collect it.
func (s *Store) Delete(ctx context.Context, k *api.Kind, namespace, name, uid, resourceVersion string) (api.Object, error) {
	fail := func(err error) (api.Object, error) {
		return nil, fmt.Errorf("delete %s %s/%s: %w", k.Singular, namespace, name, err)
	}
	for {
		r, err := s.read(ctx, k, namespace, name)
		if err != nil {
			return fail(err)
		}
		if err := r.expect(uid, resourceVersion); err != nil {
			return fail(err)
		}
		rev, err := s.state.Delete(ctx, Prefix(k, namespace)+name, r.revision)
		switch {
		case err == nil:
			r.object.Meta().ResourceVersion = formatRevision(rev)
			return r.object, nil
		case errors.Is(err, state.ErrConflict) && resourceVersion == "":
			// changed meanwhile; it goes all the same, unless it is another object now
		default:
			return fail(err)
		}
	}
}

// record is a stored object with its revision.
type record struct {
	object   api.Object
	revision int64
}

// expect compares what the caller believes the object to be with what it is.
func (r record) expect(uid, resourceVersion string) error {
	m := r.object.Meta()
	if uid != "" && uid != m.UID {
		return fmt.Errorf("%w: its uid is %s, not %s", state.ErrConflict, m.UID, uid)
	}
	if resourceVersion != "" && resourceVersion != m.ResourceVersion {
		return fmt.Errorf("%w: its resourceVersion is %s, not %s", state.ErrConflict, m.ResourceVersion, resourceVersion)
	}
	return nil
}

func (s *Store) read(ctx context.Context, k *api.Kind, namespace, name string) (record, error) {
	at, err := key(k, namespace, name)
	if err != nil {
		return record{}, err
	}
	kv, err := s.state.Get(ctx, at)
	if err != nil {
		return record{}, err
	}
	o, err := decode(k, kv)
	return record{o, kv.Revision}, err
}

// write stores o, compared with the given revision, and fills its resourceVersion.
func (s *Store) write(ctx context.Context, k *api.Kind, o api.Object, expect int64) error {
	at, err := key(k, o.Meta().Namespace, o.Meta().Name)
	if err != nil {
		return err
	}
	data, err := encode(o)
	if err != nil {
		return err
	}
	rev, err := s.state.Put(ctx, at, data, expect)
	if err != nil {
		return err
	}
	o.Meta().ResourceVersion = formatRevision(rev)
	return nil
}

func formatRevision(rev int64) string { return strconv.FormatInt(rev, 10) }

// newUID is a random UUID (version 4, RFC 9562).
func newUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand ends the program instead
	b[6] = b[6]&0x0f | 0x40
	b[8] = b[8]&0x3f | 0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// generateName adds a random suffix, as Kubernetes does for generateName.
func generateName(base string) string {
	const letters = "0123456789abcdefghijklmnopqrstuv" // 32, so that five bits choose one evenly
	var b [suffixLength]byte
	_, _ = rand.Read(b[:])
	for i := range b {
		b[i] = letters[b[i]%32]
	}
	return base[:min(len(base), maxGenerated)] + string(b[:])
}
