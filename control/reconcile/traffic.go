package reconcile

import (
	"fmt"
	"slices"
	"strconv"
	"time"

	"github.com/thawrun/thaw/api"
)

// world is what traffic asks about other objects; nil for what is not there.
type world interface {
	configuration(name) *api.Configuration
	revision(name) *api.Revision
}

// problem is why a route's wish cannot be followed. It becomes the condition AllTrafficAssigned.
type problem struct {
	status, reason, message string
}

// destination is one traffic target with the ready revision that it leads to.
type destination struct {
	api.TrafficTarget
	configuration string // set if the target follows the latest ready revision
	revision      string
}

// resolve finds the revision of each target of a route. Only if every target has a ready one is there an answer: a route
// changes as a whole or not at all, so that a bad revision takes no traffic from a good one. Of several problems a failure
// goes before a delay, and the first before later ones.
func resolve(w world, r *api.Route) ([]destination, *problem) {
	targets := r.Spec.Traffic
	if len(targets) == 0 { // a route without targets follows the configuration of its name
		all := int64(100)
		targets = []api.TrafficTarget{{ConfigurationName: r.Name, Percent: &all}}
	}
	var worst *problem
	bad := func(status, reason, format string, args ...any) {
		if worst == nil || worst.status == api.Unknown && status == api.False {
			worst = &problem{status, reason, fmt.Sprintf(format, args...)}
		}
	}
	var out []destination
	for _, t := range targets {
		d := destination{TrafficTarget: t, revision: t.RevisionName}
		if t.RevisionName == "" {
			d.configuration = t.ConfigurationName
			c := w.configuration(name{r.Namespace, d.configuration})
			switch {
			case c == nil:
				bad(api.False, api.ReasonConfigurationMissing, "Configuration %q referenced in traffic not found.", d.configuration)
				continue
			case c.Status.LatestReadyRevisionName == "" && c.Status.Conditions.IsFalse(api.ConditionReady):
				bad(api.False, api.ReasonRevisionMissing, "Configuration %q does not have any ready Revision.", d.configuration)
				continue
			case c.Status.LatestReadyRevisionName == "":
				bad(api.Unknown, api.ReasonRevisionMissing, "Configuration %q is waiting for a Revision to become ready.", d.configuration)
				continue
			}
			d.revision = c.Status.LatestReadyRevisionName
		}
		rev := w.revision(name{r.Namespace, d.revision})
		switch {
		case rev == nil:
			bad(api.False, api.ReasonRevisionMissing, "Revision %q referenced in traffic not found.", d.revision)
		case rev.Ready():
			out = append(out, d)
		case rev.Status.Conditions.IsFalse(api.ConditionReady):
			bad(api.False, api.ReasonRevisionMissing, "Revision %q failed to become ready.", d.revision)
		default:
			bad(api.Unknown, api.ReasonRevisionMissing, "Revision %q is not yet ready.", d.revision)
		}
	}
	if worst != nil {
		return nil, worst
	}
	return out, nil
}

// assign spreads the traffic over the destinations, with gradual rollouts for those that follow a latest revision. It returns
// what the status shows, which is also what the table is made of, and the state of the rollouts.
func assign(dests []destination, was rollout, served func(configuration, tag string) *share, duration time.Duration, now time.Time) ([]api.TrafficTarget, rollout) {
	var out []api.TrafficTarget
	var next rollout
	add := func(revision string, latest bool, tag string, percent int) {
		for i := range out {
			if o := &out[i]; o.RevisionName == revision && o.Tag == tag && *o.LatestRevision == latest {
				sum := *o.Percent + int64(percent)
				o.Percent = &sum
				return
			}
		}
		p := int64(percent)
		out = append(out, api.TrafficTarget{Tag: tag, RevisionName: revision, LatestRevision: &latest, Percent: &p})
	}
	for _, d := range merge(dests) {
		percent := int(*d.Percent)
		if d.configuration == "" {
			add(d.revision, false, d.Tag, percent)
			continue
		}
		prev := was.find(d.configuration, d.Tag)
		if prev == nil {
			prev = served(d.configuration, d.Tag)
		}
		s := roll(prev, share{Configuration: d.configuration, Tag: d.Tag, Percent: percent}, d.revision, duration, now)
		for i, p := range s.Parts {
			// A tag's own host goes to the newest revision at once: whoever asks for the tag wants to see that one. Only the share
			// of the main host moves gradually.
			if i < len(s.Parts)-1 {
				add(p.Revision, true, "", p.Percent)
			} else {
				add(p.Revision, true, d.Tag, p.Percent)
			}
		}
		if s.moving() {
			next.Configurations = append(next.Configurations, s)
		}
	}
	return out, next
}

// merge adds up the percentages of targets that are the same but for these.
func merge(dests []destination) []destination {
	var out []destination
	for _, d := range dests {
		var percent int64
		if d.Percent != nil {
			percent = *d.Percent
		}
		i := slices.IndexFunc(out, func(o destination) bool {
			return o.configuration == d.configuration && o.revision == d.revision && o.Tag == d.Tag
		})
		if i >= 0 {
			percent += *out[i].Percent
			out[i].Percent = &percent
			continue
		}
		d.Percent = &percent
		out = append(out, d)
	}
	return out
}

// served reads from a route's status what a target led to, for a target that has no rollout under way.
func served(w world, r *api.Route) func(configuration, tag string) *share {
	return func(configuration, tag string) *share {
		for _, t := range r.Status.Traffic {
			if t.LatestRevision == nil || !*t.LatestRevision || t.Tag != tag || t.Percent == nil || *t.Percent == 0 {
				continue
			}
			rev := w.revision(name{r.Namespace, t.RevisionName})
			if rev == nil || !rev.Ready() || rev.ConfigurationName() != configuration {
				continue
			}
			return &share{Configuration: configuration, Tag: tag, Percent: int(*t.Percent), Parts: []part{{t.RevisionName, int(*t.Percent)}}}
		}
		return nil
	}
}

// rolloutDuration is how long the latest revision of a route takes to take over. Values that validation would not have let
// in count as not given.
func (c Config) rolloutDuration(r *api.Route) time.Duration {
	if v, ok := r.Annotations[api.AnnotationRolloutDuration]; ok {
		if d, err := time.ParseDuration(v); err == nil && d >= 0 {
			return d
		}
	}
	return c.RolloutDuration
}

// url of a host, with the port if people need it.
func (c Config) url(host string, local bool) string {
	if local || c.URLPort == 0 || c.URLPort == 80 {
		return "http://" + host
	}
	return "http://" + host + ":" + strconv.Itoa(c.URLPort)
}

// routeURL is where a route, or with a tag one of its targets, is reached.
func (c Config) routeURL(r *api.Route, tag string) string {
	label := r.Name
	if tag != "" {
		label = tag + "-" + label
	}
	if r.Labels[api.LabelVisibility] == api.VisibilityClusterLocal {
		return c.url(privateHost(label, r.Namespace, c.ClusterDomain), true)
	}
	return c.url(publicHost(label, r.Namespace, c.Domain), false)
}
