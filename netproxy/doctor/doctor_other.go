//go:build !linux

package doctor

import (
	"github.com/thawrun/thaw/netproxy/tunnel"
)

// Examine says that there is nothing to try.
func Examine(...string) (Report, error) {
	r := Report{Features: []Finding{{What: "Linux", For: "everything", State: Missing, Why: tunnel.ErrUnsupported.Error()}}}
	for _, d := range tunnel.Drivers() {
		r.Drivers = append(r.Drivers, Driver{d, Missing, "needs Linux", d.Overhead()})
	}
	var err error
	r.Paths, err = paths("")
	return r, err
}
