package worker

import (
	"fmt"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"github.com/thawrun/thaw/internal/link"
)

// The rule that what comes out of a slot ends here, unless the tunnel's program took it before: programs run earlier. Should one be
// missing, nothing gets out, neither to the node itself nor through it.
const (
	sealTable = "thaw_worker"
	sealChain = "slots"
)

func seal(ns *link.Namespace) error {
	return withSeal(ns, func(c *nftables.Conn, t *nftables.Table) {
		c.AddTable(t)
		chain := c.AddChain(&nftables.Chain{
			Name: sealChain, Table: t, Type: nftables.ChainTypeFilter, Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityRaw,
		})
		c.FlushChain(chain)
		c.AddRule(&nftables.Rule{Table: t, Chain: chain, Exprs: []expr.Any{
			&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
			&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte(prefix)}, // a name that begins so
			&expr.Counter{},
			&expr.Verdict{Kind: expr.VerdictDrop},
		}})
	})
}

func unseal(ns *link.Namespace) error {
	return withSeal(ns, func(c *nftables.Conn, t *nftables.Table) { c.DelTable(t) })
}

func withSeal(ns *link.Namespace, f func(*nftables.Conn, *nftables.Table)) error {
	c, err := ns.Rules()
	if err != nil {
		return fmt.Errorf("rule for slots: %w", err)
	}
	f(c, &nftables.Table{Family: nftables.TableFamilyINet, Name: sealTable})
	if err := c.Flush(); err != nil {
		return fmt.Errorf("rule for slots: %w", err)
	}
	return nil
}
