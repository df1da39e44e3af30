// Package demonet is `thaw demo net`: two workers, a pair of gateways and two tenants with the same addresses, each in network namespaces of
// one machine; a failover while a connection talks, and three ways into a tenant's network side by side. All of it is real; what a
// cloud would take to make a NIC is the one thing that is waited for.
package demonet

import (
	"io"
	"time"
)

// Config says how to run it.
type Config struct {
	Delay time.Duration // of a cloud to make a NIC
	Out   io.Writer
}
