package objects

import (
	"bytes"
	"encoding/json"
	"fmt"
	"maps"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/state"
)

// encode is the stored form of an object: its JSON without resourceVersion, which is the key's revision and is known only after
// the write. It changes the object for a moment, so it is for this package's own copies.
func encode(o api.Object) ([]byte, error) {
	m := o.Meta()
	rv := m.ResourceVersion
	m.ResourceVersion = ""
	defer func() { m.ResourceVersion = rv }()
	return json.Marshal(o)
}

// decode reads a stored object and fills its resourceVersion.
func decode(k *api.Kind, kv state.KV) (api.Object, error) {
	o := k.New()
	if err := json.Unmarshal(kv.Value, o); err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrCorrupt, kv.Key, err)
	}
	typ := o.Type()
	typ.Kind, typ.APIVersion = k.Kind, k.APIVersion
	o.Meta().ResourceVersion = formatRevision(kv.Revision)
	return o, nil
}

// document is an object's JSON by its top members. Working on it keeps this package free of the kinds' Go types: two
// specs are the same if they are the same JSON, as the types write it.
type document map[string]json.RawMessage

// newDocument takes an object apart. The object is only read: others may read it meanwhile.
func newDocument(o api.Object) (*document, error) {
	data, err := json.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("encode %s %s: %w", o.Type().Kind, o.Meta().Name, err)
	}
	d := document{}
	if err := json.Unmarshal(data, &d); err != nil {
		return nil, fmt.Errorf("encode %s %s: %w", o.Type().Kind, o.Meta().Name, err)
	}
	return &d, nil
}

func (d *document) clone() *document {
	c := maps.Clone(*d)
	return &c
}

func (d *document) status() json.RawMessage { return (*d)["status"] }

func (d *document) setStatus(s json.RawMessage) {
	if s == nil {
		delete(*d, "status")
	} else {
		(*d)["status"] = s
	}
}

// object makes a new object of the kind. Its resourceVersion is whatever the document had.
func (d *document) object(k *api.Kind) (api.Object, error) {
	data, err := json.Marshal(*d)
	if err != nil {
		return nil, fmt.Errorf("encode %s: %w", k.Kind, err)
	}
	o := k.New()
	if err := json.Unmarshal(data, o); err != nil {
		return nil, fmt.Errorf("encode %s: %w", k.Kind, err)
	}
	typ := o.Type()
	typ.Kind, typ.APIVersion = k.Kind, k.APIVersion
	return o, nil
}

func (d *document) sameSpec(other *document) bool {
	return bytes.Equal((*d)["spec"], (*other)["spec"])
}

// equal compares everything, whatever the order of the members was.
func (d *document) equal(other *document) bool {
	return maps.EqualFunc(*d, *other, func(a, b json.RawMessage) bool { return bytes.Equal(a, b) })
}
