package api

import "fmt"

// traffic checks the targets of a Service (which may not name a configuration: it has one) or of a Route.
func (v validator) traffic(r report, targets []TrafficTarget, meta *ObjectMeta, service bool) {
	sum := int64(0)
	first := map[string]int{}
	for i := range targets {
		t := &targets[i]
		at := report{r.errs, fmt.Sprintf("%s[%d]", r.path, i)}
		v.target(at, t, service)
		if p := t.Percent; p != nil {
			// Each is within 0..100 or has its own error, and a sum must not overflow.
			sum += min(max(*p, -1000), 1000)
		}
		if t.Tag == "" {
			continue
		}
		v.tag(at.at("tag"), t.Tag, meta.Name)
		if j, ok := first[t.Tag]; ok {
			detail := fmt.Sprintf("Multiple definitions for %q", shorten(t.Tag))
			at.at("tag").add(FieldValueDuplicate, detail, "")
			report{r.errs, fmt.Sprintf("%s[%d].tag", r.path, j)}.add(FieldValueDuplicate, detail, "")
		} else {
			first[t.Tag] = i
		}
	}
	if sum != 100 {
		r.generic(fmt.Sprintf("Traffic targets sum to %d, want 100", sum))
	}
}

func (v validator) tag(r report, tag, name string) {
	if wrong := checkDNS1035(tag); wrong != nil {
		r.generic(fmt.Sprintf("invalid value: not a DNS 1035 label: %v", wrong))
		return
	}
	// The tag's host begins with the label <tag>-<name>.
	if n := len(tag) + 1 + len(name); n > maxLabel {
		r.invalidWhy(tag, fmt.Sprintf("the host label %q has %d characters, more than %d", tag+"-"+shorten(name), n, maxLabel))
	}
}

func (v validator) target(r report, t *TrafficTarget, service bool) {
	if lr := t.LatestRevision; lr != nil && *lr == (t.RevisionName != "") {
		r.at("latestRevision").generic(fmt.Sprintf("may not set revisionName %q when latestRevision is %t", shorten(t.RevisionName), *lr))
	}
	switch {
	case service && t.ConfigurationName != "":
		r.at("configurationName").forbidden()
	case t.RevisionName != "" && t.ConfigurationName != "":
		r.both("revisionName", "configurationName")
	case t.RevisionName != "":
		v.targetName(r.at("revisionName"), t.RevisionName)
	case t.ConfigurationName != "":
		v.targetName(r.at("configurationName"), t.ConfigurationName)
	case !service:
		r.neither("revisionName", "configurationName")
	}
	if p := t.Percent; p != nil && (*p < 0 || *p > 100) {
		r.at("percent").bounds(*p, 0, 100)
	}
	if t.URL != "" {
		r.at("url").forbidden()
	}
}

func (v validator) targetName(r report, name string) {
	if wrong := checkDNS1035(name); wrong != nil {
		r.invalidKey(name, wrong[0])
	}
}
