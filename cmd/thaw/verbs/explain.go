package verbs

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
)

func explainScaleCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	all := false
	cmd := &cobra.Command{
		Use:   "explain-scale SERVICE",
		Short: "Say in words why a service has as many instances as it has",
		Long: `Says of each revision of a service that has traffic or instances what there is, what the load and the queue ask for, what shaped the
number (windows, bounds, rates, the way to zero), which path requests take, and what is expected next.`,
		Example: "  thaw explain-scale hello\n  thaw explain-scale hello --all -o json",
		Args:    exactArgs("SERVICE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.open(); err != nil {
				return err
			}
			return s.explainScale(cmd.Context(), args[0], all)
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	s.outputFlag(cmd, false)
	cmd.Flags().BoolVar(&all, "all", false, "speak of revisions without traffic and instances too")
	return cmd
}

// explained is what is said about one revision.
type explained struct {
	Revision string       `json:"revision"`
	Scale    client.Scale `json:"scale"`
	Explain  []string     `json:"explain"`
}

func (s *session) explainScale(ctx context.Context, name string, all bool) error {
	svc, err := s.service(ctx, name)
	if err != nil {
		return err
	}
	revisions, err := s.revisions(ctx, name)
	if err != nil {
		return err
	}
	said := []explained{}
	for _, r := range slices.Backward(revisions) {
		scale, err := s.client.Scale(ctx, s.namespace, r.Name)
		if errors.Is(err, client.ErrNotFound) {
			continue
		}
		if err != nil {
			return err
		}
		if all || trafficOf(svc, r.Name) > 0 || scale["ready"] != 0.0 || scale["starting"] != 0.0 || scale["desired"] != 0.0 {
			said = append(said, explained{r.Name, scale, sentences(scale)})
		}
	}
	if s.structured() {
		return s.print(said)
	}
	if len(said) == 0 {
		fmt.Fprintf(s.Stdout, "No revision of %s has traffic or instances.\n", name)
	}
	for i, e := range said {
		if i > 0 {
			fmt.Fprintln(s.Stdout)
		}
		fmt.Fprintln(s.Stdout, cell(e.Revision))
		for _, text := range e.Explain {
			fmt.Fprintln(s.Stdout, "  "+cell(text))
		}
	}
	return nil
}

// trafficOf is how many percent of the traffic a revision gets.
func trafficOf(svc *api.Service, revision string) (percent int64) {
	for _, t := range svc.Status.Traffic {
		if t.RevisionName == revision && t.Percent != nil {
			percent += *t.Percent
		}
	}
	return percent
}

// sentences are the server's; an older server has none and at least its reasons are shown.
func sentences(scale client.Scale) (out []string) {
	list, _ := scale["explain"].([]any)
	for _, v := range list {
		if text, ok := v.(string); ok {
			out = append(out, text)
		}
	}
	if why, ok := scale["why"].(string); ok && len(out) == 0 {
		out = append(out, "Reasons: "+why)
	}
	return out
}
