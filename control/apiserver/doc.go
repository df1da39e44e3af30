// Package apiserver speaks the Kubernetes REST protocol for the objects of package api, well enough for the unmodified kn and
// kubectl: get, list, watch, create, replace, patch (merge, JSON, server-side apply), delete and delete-collection with resource versions,
// selectors, tables, dry runs and field validation; the discovery and OpenAPI documents those clients ask for; Kubernetes
// Status objects for every error.
//
// It promises: nothing is stored that api.Validate refuses; a client can change neither status nor the metadata that the
// server owns; every request has bounds (body, time at the store, number at once); everything but the health endpoints needs
// the token. A write that names a resource version is refused when the object changed since.
//
// It does not reconcile: what a write leads to happens elsewhere, and comes back as status. A Server is an http.Handler; Serve
// runs it on a listener until its context ends, and ends the open watches then. The API is not the data path, so net/http is
// enough here.
package apiserver
