package api

import (
	"encoding/json"
	"errors"
	"math"
	"strconv"
	"strings"
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

// ErrQuantity says that a text is no quantity.
var ErrQuantity = errors.New("quantities are a number and one of the suffixes n, u, m, k, M, G, T, P, E, Ki, Mi, Gi, Ti, Pi, Ei or an exponent")

// Value returns the quantity in its unit (cores, bytes): "100m" is 0.1, "64Mi" is 67108864. It is exact up to 2^53.
func (q Quantity) Value() (float64, error) {
	s := string(q)
	end := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' && r != '+' && r != '-' })
	if end < 0 {
		end = len(s)
	}
	number, suffix := s[:end], s[end:]
	if strings.Trim(number, "+-.") == "" || len(s) > 64 {
		return 0, ErrQuantity
	}
	v, err := strconv.ParseFloat(number, 64)
	if err != nil {
		return 0, ErrQuantity
	}
	factor, ok := map[string]float64{
		"": 1, "n": 1e-9, "u": 1e-6, "m": 1e-3, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18,
		"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "Pi": 1 << 50, "Ei": 1 << 60,
	}[suffix]
	if !ok {
		if suffix[0] != 'e' && suffix[0] != 'E' {
			return 0, ErrQuantity
		}
		e, err := strconv.ParseInt(suffix[1:], 10, 8)
		if err != nil {
			return 0, ErrQuantity
		}
		factor = math.Pow10(int(e))
	}
	return v * factor, nil
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
