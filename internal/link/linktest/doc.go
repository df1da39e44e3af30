// Package linktest gives tests networks of their own: namespaces, cables and switches that are gone when the process ends. It is used
// by tests only, on Linux.
package linktest
