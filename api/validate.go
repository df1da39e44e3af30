package api

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Limits are the bounds that an installation may move. The zero value means DefaultLimits.
type Limits struct {
	MaxTimeoutSeconds int64 // of timeoutSeconds, and so of the other two; 0 = 600. Knative's max-revision-timeout-seconds
	MaxConcurrency    int64 // of containerConcurrency; 0 = 1000. Knative's container-concurrency-max-limit
	MaxScale          int64 // of max-scale, which then may not be 0 (without bound); 0 = no limit. Knative's max-scale-limit
}

// orDefault fills in what is not set: a limit of nothing would refuse every object.
func (l Limits) orDefault() Limits {
	if l.MaxTimeoutSeconds == 0 {
		l.MaxTimeoutSeconds = DefaultLimits.MaxTimeoutSeconds
	}
	if l.MaxConcurrency == 0 {
		l.MaxConcurrency = DefaultLimits.MaxConcurrency
	}
	return l
}

// DefaultLimits are Knative's.
var DefaultLimits = Limits{MaxTimeoutSeconds: 600, MaxConcurrency: 1000}

// clusterDomain is the domain of the addresses inside an installation; a domain mapping may not lie in it.
const clusterDomain = "svc.cluster.local"

// maxAnnotations is how many bytes keys and values of all annotations may have together, as in Kubernetes.
const maxAnnotations = 256 << 10

// Validate returns what is wrong with o, which SetDefaults has seen; nil when nothing is. old is the stored object when o
// replaces it, nil when o is new. The result is sorted by field. Neither object is modified.
func Validate(o, old Object, l Limits) Errors {
	var errs Errors
	root := report{errs: &errs}
	v := validator{limits: l.orDefault()}
	switch o := o.(type) {
	case *Service:
		old, _ := old.(*Service)
		v.service(root, o, old)
	case *Configuration:
		old, _ := old.(*Configuration)
		v.configuration(root, o, old)
	case *Revision:
		old, _ := old.(*Revision)
		v.revision(root, o, old)
	case *Route:
		v.route(root, o)
	case *DomainMapping:
		v.domainMapping(root, o)
	case *VPC:
		v.vpc(root, o)
	case *Subnet:
		old, _ := old.(*Subnet)
		v.subnet(root, o, old)
	case *Gateway:
		old, _ := old.(*Gateway)
		v.gateway(root, o, old)
	case *ElasticIP:
		old, _ := old.(*ElasticIP)
		v.elasticIP(root, o, old)
	}
	return errs.tidy()
}

type validator struct{ limits Limits }

func (v validator) service(r report, o, old *Service) {
	meta := r.at("metadata")
	v.metadata(meta, &o.ObjectMeta, false)
	v.visibility(meta, o.Labels)
	v.rolloutDuration(meta.at("annotations"), o.Annotations)
	v.template(r.at("spec").at("template"), &o.Spec.Template, &o.ObjectMeta)
	v.traffic(r.at("spec").at("traffic"), o.Spec.Traffic, &o.ObjectMeta, true)
	if old != nil {
		v.nameChange(r.at("spec").at("template"), &o.Spec.Template, &old.Spec.Template)
	}
}

func (v validator) configuration(r report, o, old *Configuration) {
	v.metadata(r.at("metadata"), &o.ObjectMeta, false)
	v.template(r.at("spec").at("template"), &o.Spec.Template, &o.ObjectMeta)
	if old != nil {
		v.nameChange(r.at("spec").at("template"), &o.Spec.Template, &old.Spec.Template)
	}
}

func (v validator) revision(r report, o, old *Revision) {
	v.metadata(r.at("metadata"), &o.ObjectMeta, true)
	v.templateAnnotations(r.at("metadata").at("annotations"), o.Annotations)
	if old != nil {
		// A stored spec is not measured again: the limits may have been lowered since.
		if changed := differences("spec", &o.Spec, &old.Spec, defaultedSpec(&old.Spec)); changed != "" {
			r.at("spec").add(FieldValueForbidden, "Immutable fields changed (-old +new)", changed)
		}
		return
	}
	v.revisionSpec(r.at("spec"), &o.Spec)
}

func (v validator) route(r report, o *Route) {
	meta := r.at("metadata")
	v.metadata(meta, &o.ObjectMeta, false)
	v.visibility(meta, o.Labels)
	v.rolloutDuration(meta.at("annotations"), o.Annotations)
	v.traffic(r.at("spec").at("traffic"), o.Spec.Traffic, &o.ObjectMeta, false)
}

func (v validator) domainMapping(r report, o *DomainMapping) {
	meta := r.at("metadata")
	if o.GenerateName != "" {
		meta.at("generateName").forbidden()
	}
	if wrong := checkHost(o.Name); wrong != nil {
		meta.at("name").invalidWhy(o.Name, strings.Join(wrong, "; "))
	} else if strings.HasSuffix(o.Name, "."+clusterDomain) {
		meta.at("name").invalidWhy(o.Name, fmt.Sprintf("must not be a subdomain of cluster local domain %q", clusterDomain))
	}
	v.labelsAndAnnotations(meta, &o.ObjectMeta)
	v.visibility(meta, o.Labels)
	v.reference(r.at("spec").at("ref"), &o.Spec.Ref, o.Namespace)
}

func (v validator) reference(r report, ref *Reference, namespace string) {
	for _, f := range []struct{ name, value, want string }{
		{"apiVersion", ref.APIVersion, ServingV1},
		{"kind", ref.Kind, Services.Kind},
	} {
		if f.value == "" {
			r.at(f.name).missing()
		} else if f.value != f.want {
			r.at(f.name).unsupported(f.value, fmt.Sprintf("only %s is supported", f.want))
		}
	}
	if ref.Name == "" {
		r.at("name").missing()
	} else {
		r.at("name").wrongs(ref.Name, checkDNS1035(ref.Name))
	}
	if ref.Namespace != "" && namespace != "" && ref.Namespace != namespace {
		r.at("namespace").add(FieldValueInvalid, "mismatched namespaces",
			fmt.Sprintf("parent namespace: %q does not match ref: %q", namespace, shorten(ref.Namespace)))
	}
}

// metadata checks everything about an object's metadata. Annotations of the autoscaler have no effect but on revisions and
// on templates, so that they are refused where scaling is false.
func (v validator) metadata(r report, m *ObjectMeta, scaling bool) {
	if m.GenerateName != "" {
		if wrong := checkDNS1035Prefix(m.GenerateName); wrong != nil {
			r.at("generateName").generic(fmt.Sprintf("not a DNS 1035 label prefix: %v", wrong))
		}
	}
	if m.Name != "" {
		if wrong := checkDNS1035(m.Name); wrong != nil {
			r.at("name").generic(fmt.Sprintf("not a DNS 1035 label: %v", wrong))
		}
	}
	if m.GenerateName == "" && m.Name == "" {
		r.at("name").add(FieldValueRequired, "name or generateName is required", "")
	}
	v.labelsAndAnnotations(r, m)
	if scaling {
		return
	}
	for key := range m.Annotations {
		if strings.HasPrefix(key, AutoscalingGroup+"/") {
			r.at("annotations").invalidKey(key, `autoscaling annotations must be put under "spec.template.metadata.annotations" to work`)
		} else if a, ok := ownAnnotations[key]; ok && !a.route {
			r.at("annotations").invalidKey(key, `the annotation must be put under "spec.template.metadata.annotations" to work`)
		}
	}
}

// labelsAndAnnotations checks what the API server of Kubernetes checks for every kind.
func (v validator) labelsAndAnnotations(r report, m *ObjectMeta) {
	if m.Namespace != "" {
		r.at("namespace").wrongs(m.Namespace, checkDNS1123(m.Namespace))
	}
	for key, value := range m.Labels {
		if wrong := checkKey(key); wrong != nil {
			r.at("labels").invalidKey(key, strings.Join(wrong, "; "))
		} else if wrong := checkLabelValue(value); wrong != nil {
			r.at("labels").at(key).invalidWhy(value, strings.Join(wrong, "; "))
		}
	}
	size := 0
	for key, value := range m.Annotations {
		size += len(key) + len(value)
		// Kubernetes compares the keys of annotations without regard to case.
		if wrong := checkKey(strings.ToLower(key)); wrong != nil {
			r.at("annotations").invalidKey(key, strings.Join(wrong, "; "))
		}
		if a, ok := ownAnnotations[key]; ok {
			if expected := a.check(value, v.limits); expected != "" {
				r.at("annotations").at(key).unsupported(value, "expected "+expected)
			}
		} else if own(key) {
			r.at("annotations").invalidKey(key, "there is no such annotation")
		}
	}
	if size > maxAnnotations {
		r.at("annotations").generic(fmt.Sprintf("Too long: may not be more than %d bytes", maxAnnotations))
	}
}

func (v validator) visibility(meta report, labels map[string]string) {
	if value, ok := labels[LabelVisibility]; ok && value != VisibilityClusterLocal {
		meta.at("labels").at(LabelVisibility).invalidWhy(value, fmt.Sprintf("the only value is %q", VisibilityClusterLocal))
	}
}

func (v validator) rolloutDuration(r report, ann map[string]string) {
	v.seconds(r, ann, AnnotationRolloutDuration, "rollout-duration")
}

// seconds checks an annotation that is a duration of whole seconds, zero or more.
func (v validator) seconds(r report, ann map[string]string, key, name string) {
	value := ann[key]
	if value == "" {
		return
	}
	switch d, err := time.ParseDuration(value); {
	case err != nil:
		r.at(key).invalid(value)
	case d.Round(time.Second) != d:
		r.at(key).generic(fmt.Sprintf("%s=%s is not at second precision", name, value))
	case d < 0:
		r.at(key).generic(fmt.Sprintf("%s=%s must be positive", name, value))
	}
}

// template checks the template of a Service or a Configuration, whose metadata is parent.
func (v validator) template(r report, t *RevisionTemplate, parent *ObjectMeta) {
	meta := r.at("metadata")
	if t.GenerateName != "" {
		if wrong := checkDNS1035Prefix(t.GenerateName); wrong != nil {
			meta.at("generateName").generic(fmt.Sprintf("not a DNS 1035 label prefix: %v", wrong))
		}
	}
	if t.Name != "" {
		v.revisionName(meta.at("name"), t.Name, parent)
	}
	v.labelsAndAnnotations(meta, &t.ObjectMeta)
	v.templateAnnotations(meta.at("annotations"), t.Annotations)
	v.revisionSpec(r.at("spec"), &t.Spec)
}

func (v validator) revisionName(r report, name string, parent *ObjectMeta) {
	if wrong := checkDNS1035(name); wrong != nil {
		r.generic(fmt.Sprintf("not a DNS 1035 label: %v", wrong))
		return
	}
	if parent.Name == "" {
		// The parent's name is not known before it is stored, so no name can have the right prefix.
		r.forbidden()
		return
	}
	if prefix := parent.Name + "-"; !strings.HasPrefix(name, prefix) {
		r.invalid(fmt.Sprintf("%q must have prefix %q", name, prefix))
	}
}

// templateAnnotations checks the annotations that tell how a revision is run.
func (v validator) templateAnnotations(r report, ann map[string]string) {
	v.scaling(r, ann)
	for key := range ann {
		if a, ok := ownAnnotations[key]; ok && a.route {
			r.invalidKey(key, "the annotation belongs to a Service, a Route or a DomainMapping itself")
		}
	}
	if ann[AnnotationEgress] == EgressFixed && ann[AnnotationSubnet] == "" {
		r.at(AnnotationEgress).invalidWhy(EgressFixed, "the address belongs to a subnet, which the annotation "+AnnotationSubnet+" must name")
	}
	if ann[AnnotationSubnet] != "" && ann[AnnotationNetwork] == NetworkHost {
		r.at(AnnotationSubnet).invalidWhy(ann[AnnotationSubnet], "a function with the annotation "+AnnotationNetwork+" shares the machine's network and can join no subnet")
	}
	if value := ann[AnnotationProgressDeadline]; value != "" {
		if d, err := time.ParseDuration(value); err == nil && d == 0 {
			r.at(AnnotationProgressDeadline).generic(fmt.Sprintf("progress-deadline=%s must be positive", value))
		} else {
			v.seconds(r, ann, AnnotationProgressDeadline, "progress-deadline")
		}
	}
}

// nameChange refuses a template that changed while its given name did not: a revision never changes.
func (v validator) nameChange(r report, t, old *RevisionTemplate) {
	if t.Name == "" || t.Name != old.Name {
		return
	}
	defaulted := *old
	defaulted.Spec = *defaultedSpec(&old.Spec)
	if changed := differences("", t, old, &defaulted); changed != "" {
		r.at("metadata").at("name").add(FieldValueInvalid, "Saw the following changes without a name change (-old +new)", changed)
	}
}

// FreeName takes the given name off o's template when the template of old has the same one and only labels or annotations
// differ, and returns a warning then. The name belongs to the revision that exists; the new one gets a generated name. Knative
// refuses such an update, and kn sends it all the same: "kn service update --scale-init" keeps the name that an earlier
// "--revision-name" gave. A template whose spec differs is left as it is, for Validate to refuse.
func FreeName(o, old Object) (warning string) {
	t, was := templateOf(o), templateOf(old)
	if t == nil || was == nil || t.Name == "" || t.Name != was.Name {
		return ""
	}
	if !equalJSON(t.Spec, was.Spec) && !equalJSON(t.Spec, *defaultedSpec(&was.Spec)) {
		return ""
	}
	if maps.Equal(t.Labels, was.Labels) && maps.Equal(t.Annotations, was.Annotations) {
		return ""
	}
	warning = fmt.Sprintf("spec.template.metadata.name: %s is the revision before this change; the new one gets a generated name", t.Name)
	t.Name = ""
	return warning
}

func templateOf(o Object) *RevisionTemplate {
	switch o := o.(type) {
	case *Service:
		return &o.Spec.Template
	case *Configuration:
		return &o.Spec.Template
	}
	return nil
}

// defaultedSpec is a stored spec with the defaults of today, so that a default that is new is no change.
func defaultedSpec(s *RevisionSpec) *RevisionSpec {
	c := DeepCopy(&Revision{Spec: *s})
	c.Spec.setDefaults()
	return &c.Spec
}

// differences lists what is not the same in now as in each of the old values, for people; empty when now equals one of
// them.
func differences(path string, now any, old ...any) string {
	for _, o := range old {
		if equalJSON(now, o) {
			return ""
		}
	}
	var lines []string
	diff(path, tree(old[len(old)-1]), tree(now), &lines)
	if len(lines) > 8 {
		lines = append(lines[:8], fmt.Sprintf("and %d more", len(lines)-8))
	}
	if len(lines) == 0 {
		return "the object is not the same as before"
	}
	return strings.Join(lines, "; ")
}

// diff walks two JSON trees and notes each leaf that differs as "path: -old +new".
func diff(path string, old, now any, lines *[]string) {
	switch o := old.(type) {
	case map[string]any:
		if n, ok := now.(map[string]any); ok {
			keys := slices.Collect(maps.Keys(o))
			for k := range n {
				if _, ok := o[k]; !ok {
					keys = append(keys, k)
				}
			}
			slices.Sort(keys)
			for _, k := range keys {
				diff(join(path, k), o[k], n[k], lines)
			}
			return
		}
	case []any:
		if n, ok := now.([]any); ok && len(n) == len(o) {
			for i := range o {
				diff(fmt.Sprintf("%s[%d]", path, i), o[i], n[i], lines)
			}
			return
		}
	}
	a, b := leaf(old), leaf(now)
	switch {
	case a == b:
	case old == nil:
		*lines = append(*lines, fmt.Sprintf("%s: +%s", path, shorten(b)))
	case now == nil:
		*lines = append(*lines, fmt.Sprintf("%s: -%s", path, shorten(a)))
	default:
		*lines = append(*lines, fmt.Sprintf("%s: -%s +%s", path, shorten(a), shorten(b)))
	}
}
