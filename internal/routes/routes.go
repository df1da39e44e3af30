// Package routes is the route table: which host leads to which revisions, by what weight. Control builds a Table from the
// routes and domain mappings, the router reads it. A Table is immutable after Build.
package routes

import "github.com/thawrun/thaw/api"

// Target is one revision that a route leads to.
type Target struct {
	Revision api.RevisionID
	Percent  int // of the requests that name no tag; the percentages of a Route sum to 100
}

// Route is what one host leads to.
type Route struct {
	Namespace string
	Service   string // name of the Service (or of the Route, if no service owns it)
	Tag       string // set for a tag host
	// Local hosts (visibility cluster-local) are served only to requests that come from inside.
	Local   bool
	Targets []Target
	Limits  api.Timeouts // of this route's requests, beside those of the revision
	// Tags are the revisions that the header Knative-Serving-Tag selects on the main host.
	Tags map[string]api.RevisionID
}

// Table maps a lower-case host without port to its route. Wildcard hosts begin with "*."; "*" is every
// host that nothing else matches.
type Table struct {
	Hosts map[string]*Route
}
