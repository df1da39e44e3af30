// Package pairs makes gateway pairs of one machine, for thaw dev: a worker and the two nodes of all pairs are network namespaces with a switch
// between them, and each node is a process of its own, `thaw gateway`, as on machines. It is a reconcile.Network.
package pairs

import (
	"log/slog"

	"github.com/thawrun/thaw/netproxy/gateway"
)

// Config is what a Machine needs to know.
type Config struct {
	Dir     string         // folder for what outlives a process that is killed: nobody else's; made if it is not there
	Program string         // the program whose command gateway is a node's
	Policy  gateway.Policy // says when a subnet gets another pair, and when one goes
	Log     *slog.Logger
}
