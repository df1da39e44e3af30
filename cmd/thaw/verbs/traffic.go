package verbs

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
)

// latest stands for "the latest ready revision, whichever that is" in --to and --tag.
const latest = "@latest"

func trafficCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	var to, tag, untag []string
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "traffic NAME",
		Short: "Show or change how a service's requests are split over its revisions",
		Long: `Traffic without flags shows the split. --to says the whole split anew: its percentages sum to 100, and what is not named
gets nothing. --tag gives a revision a name and a host of its own (TAG-NAME.NAMESPACE.DOMAIN), --untag takes it away; both
leave the split as it is. @latest stands for the latest ready revision, also of later deploys.`,
		Example: "  thaw traffic hello --to hello-00001=80 --to @latest=20\n  thaw traffic hello --tag @latest=next\n  thaw traffic hello --untag next",
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			edit, err := parseTrafficEdit(to, tag, untag)
			if err != nil {
				return err
			}
			if err := s.open(); err != nil {
				return err
			}
			return s.traffic(cmd.Context(), args[0], edit, wait)
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	s.outputFlag(cmd, false)
	wait.register(cmd)
	f := cmd.Flags()
	f.StringArrayVar(&to, "to", nil, "REVISION=PERCENT, with @latest as a revision too; may be repeated, the sum is 100")
	f.StringArrayVar(&tag, "tag", nil, "REVISION=TAG; may be repeated")
	f.StringArrayVar(&untag, "untag", nil, "tag to take away; may be repeated")
	return cmd
}

// trafficEdit is what the flags ask for.
type trafficEdit struct {
	to    []share // empty = the split stays
	tag   []naming
	untag []string
}

type share struct {
	revision string
	percent  int64
}

type naming struct{ revision, tag string }

func (e trafficEdit) empty() bool { return len(e.to)+len(e.tag)+len(e.untag) == 0 }

func parseTrafficEdit(to, tag, untag []string) (trafficEdit, error) {
	e := trafficEdit{untag: untag}
	var sum int64
	for _, pair := range to {
		rev, number, ok := strings.Cut(pair, "=")
		n, err := strconv.ParseInt(strings.TrimSuffix(number, "%"), 10, 64)
		if !ok || rev == "" || err != nil {
			return e, usage("--to %q is not of the form REVISION=PERCENT", pair)
		}
		if n < 0 || n > 100 {
			return e, usage("--to %q: the percentage must be from 0 to 100", pair)
		}
		if slices.ContainsFunc(e.to, func(s share) bool { return s.revision == rev }) {
			return e, usage("--to names %s twice", rev)
		}
		e.to = append(e.to, share{rev, n})
		sum += n
	}
	if len(to) > 0 && sum != 100 {
		return e, usage("the percentages of --to sum to %d, not to 100", sum)
	}
	for _, pair := range tag {
		rev, name, ok := strings.Cut(pair, "=")
		if !ok || rev == "" || name == "" {
			return e, usage("--tag %q is not of the form REVISION=TAG", pair)
		}
		if slices.ContainsFunc(e.tag, func(n naming) bool { return n.tag == name }) {
			return e, usage("--tag gives %q twice", name)
		}
		e.tag = append(e.tag, naming{rev, name})
	}
	return e, nil
}

// editTraffic applies an edit to a split: first tags are taken away, then the split is said anew, then tags are given. It
// changes nothing that the edit does not name. A service without a split sends everything to the latest revision.
func editTraffic(current []api.TrafficTarget, e trafficEdit) ([]api.TrafficTarget, error) {
	targets := make([]api.TrafficTarget, 0, len(current)+len(e.to)+len(e.tag))
	for _, t := range current {
		t.URL = ""
		targets = append(targets, t)
	}
	if len(targets) == 0 {
		targets = append(targets, target(latest, "", 100))
	}
	for _, tag := range e.untag {
		i := slices.IndexFunc(targets, func(t api.TrafficTarget) bool { return t.Tag == tag })
		if i < 0 {
			return nil, fmt.Errorf("no target has the tag %q; the split is %s", tag, trafficText(current))
		}
		targets[i].Tag = ""
	}
	if len(e.to) > 0 {
		for i := range targets {
			targets[i].Percent = nil
		}
		for _, s := range e.to {
			i := slices.IndexFunc(targets, func(t api.TrafficTarget) bool { return pointsTo(t, s.revision) })
			if i < 0 {
				targets = append(targets, target(s.revision, "", s.percent))
				continue
			}
			targets[i].Percent = &s.percent
		}
	}
	for _, n := range e.tag {
		if i := slices.IndexFunc(targets, func(t api.TrafficTarget) bool { return t.Tag == n.tag }); i >= 0 {
			if pointsTo(targets[i], n.revision) {
				continue
			}
			return nil, fail(fmt.Errorf("the tag %q is at %s already", n.tag, targetName(targets[i])), "add --untag %s to move it", n.tag)
		}
		i := slices.IndexFunc(targets, func(t api.TrafficTarget) bool { return pointsTo(t, n.revision) && t.Tag == "" })
		if i < 0 {
			targets = append(targets, target(n.revision, n.tag, 0))
			continue
		}
		targets[i].Tag = n.tag
	}
	// What has neither share nor tag means nothing; entries for one revision without tags are one entry.
	var out []api.TrafficTarget
	for _, t := range targets {
		if shareOf(t) == 0 && t.Tag == "" {
			continue
		}
		i := slices.IndexFunc(out, func(o api.TrafficTarget) bool { return targetName(o) == targetName(t) && o.Tag == t.Tag })
		if i < 0 {
			out = append(out, t)
			continue
		}
		sum := shareOf(out[i]) + shareOf(t)
		out[i].Percent = &sum
	}
	return out, nil
}

func target(revision, tag string, percent int64) api.TrafficTarget {
	t := api.TrafficTarget{Tag: tag, Percent: &percent}
	isLatest := revision == latest
	t.LatestRevision = &isLatest
	if !isLatest {
		t.RevisionName = revision
	}
	return t
}

func pointsTo(t api.TrafficTarget, revision string) bool {
	if revision == latest {
		return t.RevisionName == "" && t.ConfigurationName == ""
	}
	return t.RevisionName == revision
}

func shareOf(t api.TrafficTarget) int64 {
	if t.Percent == nil {
		return 0
	}
	return *t.Percent
}

func (s *session) traffic(ctx context.Context, name string, e trafficEdit, wait waitFlags) error {
	svc, err := s.service(ctx, name)
	if err != nil {
		return err
	}
	if !e.empty() {
		if svc, err = s.changeTraffic(ctx, svc, func(v *api.Service) ([]api.TrafficTarget, error) {
			return editTraffic(v.Spec.Traffic, e)
		}, wait); err != nil {
			return err
		}
	}
	return s.printTraffic(svc)
}

// changeTraffic writes a new split, again if somebody else wrote meanwhile, and waits until it is in force.
func (s *session) changeTraffic(ctx context.Context, svc *api.Service, edit func(*api.Service) ([]api.TrafficTarget, error), wait waitFlags) (*api.Service, error) {
	for try := 0; ; try++ {
		targets, err := edit(svc)
		if err != nil {
			return nil, err
		}
		// The resource version makes the server refuse the patch when the split that was edited is no longer the one there.
		patch, err := json.Marshal(map[string]any{
			"metadata": map[string]any{"resourceVersion": svc.ResourceVersion},
			"spec":     map[string]any{"traffic": targets},
		})
		if err != nil {
			return nil, err
		}
		o, err := s.client.Patch(ctx, api.Services, svc.Namespace, svc.Name, client.MergePatch, patch)
		if errors.Is(err, client.ErrConflict) && try < 5 {
			if svc, err = s.service(ctx, svc.Name); err != nil {
				return nil, err
			}
			continue
		}
		if err != nil {
			return nil, err
		}
		if wait.no {
			return o.(*api.Service), nil
		}
		if o, err = s.waitReady(ctx, api.Services, svc.Namespace, svc.Name, wait); err != nil {
			return nil, err
		}
		return o.(*api.Service), nil
	}
}

func (s *session) printTraffic(svc *api.Service) error {
	if s.structured() {
		return s.print(svc.Status.Traffic)
	}
	rows := make([][]string, 0, len(svc.Status.Traffic))
	for _, t := range svc.Status.Traffic {
		isLatest := ""
		if t.LatestRevision != nil && *t.LatestRevision {
			isLatest = "yes"
		}
		rows = append(rows, []string{t.RevisionName, percentText(t), isLatest, t.Tag, t.URL})
	}
	return table(s.Stdout, []string{"REVISION", "PERCENT", "LATEST", "TAG", "URL"}, rows)
}

func rollbackCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	var to string
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "rollback NAME",
		Short: "Send all traffic to an earlier revision",
		Long: `Rollback sends all requests to an earlier revision: the newest ready one before the newest that has traffic now, or
the one that --to names. Tags stay. From then on the traffic is pinned: a later deploy gets none until
"thaw traffic NAME --to @latest=100".`,
		Example: "  thaw rollback hello\n  thaw rollback hello --to hello-00001",
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.open(); err != nil {
				return err
			}
			return s.rollback(cmd.Context(), args[0], to, wait)
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	s.outputFlag(cmd, false)
	wait.register(cmd)
	cmd.Flags().StringVar(&to, "to", "", "revision to go back to")
	return cmd
}

// revisions are those of a service, oldest first.
func (s *session) revisions(ctx context.Context, service string) ([]*api.Revision, error) {
	objects, _, err := s.client.List(ctx, api.Revisions, s.namespace, client.ListOptions{LabelSelector: api.LabelService + "=" + service})
	if err != nil {
		return nil, err
	}
	revisions := make([]*api.Revision, len(objects))
	for i, o := range objects {
		revisions[i] = o.(*api.Revision)
	}
	slices.SortFunc(revisions, func(a, b *api.Revision) int {
		return cmp.Or(cmp.Compare(stampedBy(a), stampedBy(b)), strings.Compare(a.Name, b.Name))
	})
	return revisions, nil
}

// stampedBy is the generation of the configuration that a revision was stamped from: the order in which revisions came. Creation
// times have only seconds.
func stampedBy(r *api.Revision) int64 {
	n, _ := strconv.ParseInt(r.Labels[api.LabelConfigurationGeneration], 10, 64)
	return n
}

// rollbackTarget chooses the revision to go back to: the newest ready one before the newest that has traffic. So a canary
// with a few percent is taken back to what has the rest. revisions are oldest first.
func rollbackTarget(revisions []*api.Revision, serving []api.TrafficTarget) (string, error) {
	i := len(revisions) - 1
	for ; i >= 0; i-- {
		if slices.ContainsFunc(serving, func(t api.TrafficTarget) bool { return t.RevisionName == revisions[i].Name && shareOf(t) > 0 }) {
			break
		}
	}
	if i < 0 {
		return "", errors.New("no revision has traffic now, so there is nothing to go back from")
	}
	newest := revisions[i].Name
	for i--; i >= 0; i-- {
		if revisions[i].Ready() {
			return revisions[i].Name, nil
		}
	}
	return "", fmt.Errorf("there is no ready revision before %s", newest)
}

func (s *session) rollback(ctx context.Context, name, to string, wait waitFlags) error {
	svc, err := s.service(ctx, name)
	if err != nil {
		return err
	}
	revisions, err := s.revisions(ctx, name)
	if err != nil {
		return err
	}
	hint := "thaw list revisions -l " + api.LabelService + "=" + name + s.nsFlag()
	if to == "" {
		if to, err = rollbackTarget(revisions, svc.Status.Traffic); err != nil {
			return fail(err, "%s", hint)
		}
	} else if !slices.ContainsFunc(revisions, func(r *api.Revision) bool { return r.Name == to }) {
		return fail(fmt.Errorf("service %q has no revision %q: %w", name, to, client.ErrNotFound), "%s", hint)
	}
	svc, err = s.changeTraffic(ctx, svc, func(v *api.Service) ([]api.TrafficTarget, error) {
		return editTraffic(v.Spec.Traffic, trafficEdit{to: []share{{to, 100}}})
	}, wait)
	if err != nil {
		return err
	}
	if s.structured() {
		return s.printTraffic(svc)
	}
	fmt.Fprintf(s.Stdout, "service/%s rolled back to %s\n", name, to)
	fmt.Fprintf(s.Stderr, "note: later deploys get no traffic until: thaw traffic %s --to @latest=100%s\n", name, s.nsFlag())
	return nil
}
