package verbs

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/internal/client"
)

// nodeCommand has the verbs for those who look after the machines of a cluster.
func nodeCommand(env *Env) *cobra.Command {
	cmd := &cobra.Command{Use: "node", Short: "Nodes of a cluster: list them, take them out of use and back", Args: cobra.NoArgs}
	cmd.AddCommand(nodeList(env), nodeDrain(env),
		nodeSchedule(env, "cordon", "cordoned", "Let no new instances go to a node",
			`What is there stays, and is restarted there if it breaks. It holds until "thaw node uncordon", over restarts of the node too.`),
		nodeSchedule(env, "uncordon", "on", "Let a node take part again", `It is used as all others from now on, whether it was cordoned or drained.`))
	return cmd
}

func nodeList(env *Env) *cobra.Command {
	s := &session{Env: env}
	cmd := &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List the nodes", Args: cobra.NoArgs,
		Long: `STATE is ready, silent (connected to nobody, or standing still) or gone (not there, but cordoned or drained). SCHEDULING is on, cordoned or
draining. INSTANCES are those that start or serve, DRAINING those that finish the requests inside.`,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.open(); err != nil {
				return err
			}
			nodes, err := s.nodes(cmd.Context())
			if err != nil {
				return err
			}
			if s.structured() {
				return s.print(nodes)
			}
			rows := make([][]string, 0, len(nodes))
			for _, n := range nodes {
				rows = append(rows, []string{n.Name, n.State, n.Scheduling, strconv.Itoa(n.Instances), strconv.Itoa(n.Draining), strconv.Itoa(n.Frozen), n.Address})
			}
			return table(s.Stdout, []string{"NAME", "STATE", "SCHEDULING", "INSTANCES", "DRAINING", "FROZEN", "ADDRESS"}, rows)
		},
	}
	s.serverFlags(cmd)
	s.outputFlag(cmd, false)
	return cmd
}

func nodeSchedule(env *Env, verb, scheduling, short, long string) *cobra.Command {
	s := &session{Env: env}
	cmd := &cobra.Command{Use: verb + " NAME", Short: short, Long: long, Args: exactArgs("NAME"), Example: "  thaw node " + verb + " node-7",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.open(); err != nil {
				return err
			}
			if err := s.schedule(cmd.Context(), args[0], scheduling); err != nil {
				return err
			}
			fmt.Fprintf(s.Stdout, "node/%s %sed\n", args[0], verb)
			return nil
		},
	}
	s.serverFlags(cmd)
	return cmd
}

func nodeDrain(env *Env) *cobra.Command {
	s := &session{Env: env}
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "drain NAME",
		Short: "Move all instances of a node to others, without a failed request",
		Long: `No new instance goes to the node. Those that are there end one by one as others get ready elsewhere, each after the requests inside it are
answered. What nobody else has room for stays, and is moved as soon as there is some. It holds until "thaw node uncordon", over restarts of the
node too. The command returns when nothing is left there but frozen instances, which end with the agent.`,
		Args:    exactArgs("NAME"),
		Example: "  thaw node drain node-7 && ssh node-7 systemctl stop thaw-agent",
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.open(); err != nil {
				return err
			}
			return s.drain(cmd.Context(), args[0], wait)
		},
	}
	s.serverFlags(cmd)
	wait.register(cmd)
	return cmd
}

func (s *session) nodes(ctx context.Context) ([]client.Node, error) {
	nodes, err := s.client.Nodes(ctx)
	if errors.Is(err, client.ErrNotFound) {
		return nil, fmt.Errorf("this server has no nodes: it runs everything in one process: %w", client.ErrNotFound)
	}
	return nodes, err
}

func (s *session) schedule(ctx context.Context, name, scheduling string) error {
	err := s.client.ScheduleNode(ctx, name, scheduling)
	if errors.Is(err, client.ErrNotFound) {
		return fail(fmt.Errorf("no node %q: %w", name, client.ErrNotFound), "thaw node list")
	}
	return err
}

// drainLook is the pause between two looks at a node that is drained. It has to be empty at two of them: an order that was on its way may still
// have come after the first.
const drainLook = 500 * time.Millisecond

func (s *session) drain(ctx context.Context, name string, wait waitFlags) error {
	if err := s.schedule(ctx, name, "draining"); err != nil {
		return err
	}
	if wait.no {
		fmt.Fprintf(s.Stdout, "node/%s draining\n", name)
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, wait.timeout)
	defer cancel()
	left, empty := -1, 0
	for {
		select {
		case <-ctx.Done():
			return &Failure{Err: fmt.Errorf("node %q still has %d instances after %v", name, left, wait.timeout), Next: "thaw node list", Code: ExitNotReady}
		case <-time.After(drainLook):
		}
		nodes, err := s.nodes(ctx)
		if ctx.Err() != nil {
			continue
		}
		if err != nil {
			return err
		}
		i := slices.IndexFunc(nodes, func(n client.Node) bool { return n.Name == name })
		if i < 0 || nodes[i].State == "gone" {
			return fmt.Errorf("node %q has gone while it was drained", name)
		}
		now := nodes[i].Instances + nodes[i].Draining
		if now != left {
			s.say("  %d instances left", now)
		}
		left = now
		if nodes[i].State != "ready" || left > 0 {
			empty = 0
		} else if empty++; empty == 2 {
			fmt.Fprintf(s.Stdout, "node/%s drained\n", name)
			return nil
		}
	}
}
