// Package tool names the ACME authority that the tests in the folder above order certificates from: Pebble, which Let's Encrypt keeps for
// this purpose, and the name server that it asks. It is a module of its own, so that Thaw does not depend on it.
package tool
