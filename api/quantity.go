package api

import (
	"encoding/json"
	"strconv"
)

// Quantity is a Kubernetes resource quantity as written ("100m", "64Mi"). JSON numbers are accepted and kept as text.
type Quantity string

// UnmarshalJSON takes a string or a number.
func (q *Quantity) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] != '"' {
		var n json.Number
		if err := json.Unmarshal(b, &n); err != nil {
			return err
		}
		*q = Quantity(n.String())
		return nil
	}
	return json.Unmarshal(b, (*string)(q))
}

// IntOrString is a port: a number, or the name of the container's port.
type IntOrString struct {
	Int    int32
	String string // empty = Int counts
}

// MarshalJSON writes a number or a string.
func (v IntOrString) MarshalJSON() ([]byte, error) {
	if v.String != "" {
		return json.Marshal(v.String)
	}
	return strconv.AppendInt(nil, int64(v.Int), 10), nil
}

// UnmarshalJSON takes a number or a string.
func (v *IntOrString) UnmarshalJSON(b []byte) error {
	if len(b) > 0 && b[0] == '"' {
		v.Int = 0
		return json.Unmarshal(b, &v.String)
	}
	v.String = ""
	return json.Unmarshal(b, &v.Int)
}

// IsZero says that neither form is set.
func (v IntOrString) IsZero() bool { return v == IntOrString{} }
