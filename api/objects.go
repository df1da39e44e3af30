package api

import (
	"bytes"
	"encoding/json"
	"fmt"
	"reflect"
)

// StatusOf returns the part of an object's status that all kinds share; nil for a kind that is not of this package.
func StatusOf(o Object) *Status {
	switch v := o.(type) {
	case *Service:
		return &v.Status.Status
	case *Configuration:
		return &v.Status.Status
	case *Revision:
		return &v.Status.Status
	case *Route:
		return &v.Status.Status
	case *DomainMapping:
		return &v.Status.Status
	case *VPC:
		return &v.Status.Status
	case *Subnet:
		return &v.Status.Status
	case *Gateway:
		return &v.Status.Status
	case *ElasticIP:
		return &v.Status.Status
	}
	return nil
}

// KindOf returns the kind of an object by its Go type; nil for a kind that is not of this package.
func KindOf(o Object) *Kind {
	switch o.(type) {
	case *Service:
		return Services
	case *Configuration:
		return Configurations
	case *Revision:
		return Revisions
	case *Route:
		return Routes
	case *DomainMapping:
		return DomainMappings
	case *VPC:
		return VPCs
	case *Subnet:
		return Subnets
	case *Gateway:
		return Gateways
	case *ElasticIP:
		return ElasticIPs
	}
	return nil
}

// specOf returns a pointer to the spec.
func specOf(o Object) any {
	switch v := o.(type) {
	case *Service:
		return &v.Spec
	case *Configuration:
		return &v.Spec
	case *Revision:
		return &v.Spec
	case *Route:
		return &v.Spec
	case *DomainMapping:
		return &v.Spec
	case *VPC:
		return &v.Spec
	case *Subnet:
		return &v.Spec
	case *Gateway:
		return &v.Spec
	case *ElasticIP:
		return &v.Spec
	}
	return nil
}

// EqualSpec says whether two objects have the same kind and, on the wire, the same spec. What differs only in memory
// (nil against empty, the order of keys or spaces in raw JSON) is equal.
func EqualSpec(a, b Object) bool {
	if reflect.TypeOf(a) != reflect.TypeOf(b) {
		return false
	}
	return equalJSON(specOf(a), specOf(b))
}

// equalJSON compares two values as the wire shows them.
func equalJSON(a, b any) bool {
	if reflect.DeepEqual(a, b) {
		return true
	}
	x, errx := canonical(a)
	y, erry := canonical(b)
	return errx == nil && erry == nil && bytes.Equal(x, y)
}

// canonical is JSON with sorted keys, without spaces, numbers as written.
func canonical(v any) ([]byte, error) {
	data, err := json.Marshal(v)
	if err != nil {
		return nil, err
	}
	var tree any
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&tree); err != nil {
		return nil, err
	}
	return json.Marshal(tree)
}

// DeepCopy returns a copy of o that shares nothing with it. It goes by way of JSON, so empty and nil may be swapped, as
// on the wire; an object that cannot be written as JSON (invalid raw JSON put in by hand) is a caller's bug and panics.
func DeepCopy[T Object](o T) T {
	data, err := json.Marshal(o)
	if err != nil {
		panic(fmt.Sprintf("api: copy of %T: %v", o, err))
	}
	c := reflect.New(reflect.TypeOf(o).Elem()).Interface().(T)
	if err := json.Unmarshal(data, c); err != nil {
		panic(fmt.Sprintf("api: copy of %T: %v", o, err))
	}
	return c
}

// tree is v as encoding/json reads it into any; nil when it cannot be written.
func tree(v any) any {
	data, err := canonical(v)
	if err != nil {
		return nil
	}
	var t any
	if json.Unmarshal(data, &t) != nil {
		return nil
	}
	return t
}

// leaf writes one value of a tree.
func leaf(v any) string {
	if v == nil {
		return ""
	}
	data, _ := json.Marshal(v) // what was read from JSON can be written
	return string(data)
}
