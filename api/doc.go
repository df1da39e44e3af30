// Package api is the vocabulary of Thaw: the objects of serving.knative.dev in their JSON form, their defaults, their
// validation with Kubernetes-style field paths, and their conditions. It knows no store, no server and no clock: whoever
// calls passes the time. It imports only the standard library.
package api
