package api

import (
	"fmt"
	"slices"
	"strings"
)

// Unsupported returns one sentence for each field of o that is accepted and kept but has no effect yet, sorted. The
// sentences begin with the field's path; they are made for Warning headers and for a condition.
func Unsupported(o Object) []string {
	u := &unsupported{}
	switch o := o.(type) {
	case *Service:
		u.annotations("metadata.annotations", o.Annotations)
		u.annotations("spec.template.metadata.annotations", o.Spec.Template.Annotations)
		u.spec("spec.template.spec", &o.Spec.Template.Spec)
	case *Configuration:
		u.annotations("metadata.annotations", o.Annotations)
		u.annotations("spec.template.metadata.annotations", o.Spec.Template.Annotations)
		u.spec("spec.template.spec", &o.Spec.Template.Spec)
	case *Revision:
		u.annotations("metadata.annotations", o.Annotations)
		u.spec("spec", &o.Spec)
	case *Route:
		u.annotations("metadata.annotations", o.Annotations)
	case *DomainMapping:
		u.annotations("metadata.annotations", o.Annotations)
		u.when(present(o.Spec.TLS), "spec.tls", "certificates are not served yet")
	}
	slices.Sort(u.lines)
	return u.lines
}

type unsupported struct{ lines []string }

func (u *unsupported) when(set bool, path, why string) {
	if set {
		u.lines = append(u.lines, path+": "+why)
	}
}

func (u *unsupported) spec(path string, s *RevisionSpec) {
	u.when(full(s.Volumes), path+".volumes", "volumes are not mounted yet")
	u.when(full(s.ImagePullSecrets), path+".imagePullSecrets", "there are no secrets yet, images are fetched without them")
	u.when(s.ServiceAccountName != "" && s.ServiceAccountName != "default", path+".serviceAccountName", "there are no service accounts")
	u.when(s.EnableServiceLinks != nil && *s.EnableServiceLinks, path+".enableServiceLinks", "no variables with the addresses of other services are set")
	serving := s.serving() // once: it searches
	for i := range s.Containers {
		at := fmt.Sprintf("%s.containers[%d]", path, i)
		c := &s.Containers[i]
		u.when(c != serving && len(s.Containers) > 1, at, "only the container with the port is started, sidecars are not yet")
		u.container(at, c)
	}
}

func (u *unsupported) container(path string, c *Container) {
	u.when(full(c.EnvFrom), path+".envFrom", "there are no secrets and config maps yet, the variables are not set")
	for i := range c.Env {
		u.when(present(c.Env[i].ValueFrom), fmt.Sprintf("%s.env[%d].valueFrom", path, i), "there are no secrets and config maps yet, the variable is not set")
	}
	u.when(full(c.VolumeMounts), path+".volumeMounts", "volumes are not mounted yet")
	u.when(full(c.SecurityContext), path+".securityContext", "the function runs with the rights of its node's agent")
	u.when(c.TerminationMessagePath != "", path+".terminationMessagePath", "no message is read, the last output is reported")
	for _, p := range []struct {
		name  string
		probe *Probe
	}{{"readinessProbe", c.ReadinessProbe}, {"livenessProbe", c.LivenessProbe}, {"startupProbe", c.StartupProbe}} {
		if p.probe == nil {
			continue
		}
		u.when(p.probe.TerminationGracePeriodSeconds != nil, path+"."+p.name+".terminationGracePeriodSeconds", "an instance that is ended has the same grace period whatever the cause")
		u.when(p.probe.TCPSocket != nil && p.probe.TCPSocket.Host != "", path+"."+p.name+".tcpSocket.host", "probes always go to the instance itself")
	}
}

// full says that a raw value is there and more than an empty list or object.
func full(raw []byte) bool {
	s := strings.Join(strings.Fields(string(raw)), "")
	return s != "" && s != "null" && s != "[]" && s != "{}"
}

// annotations names those of Knative's that nothing reads here, and those that Knative does not have either.
func (u *unsupported) annotations(path string, ann map[string]string) {
	for key := range ann {
		group, name, _ := strings.Cut(key, "/")
		switch {
		case group == AutoscalingGroup && !knownScaling(name):
			u.lines = append(u.lines, fmt.Sprintf("%s[%s]: there is no such annotation of the autoscaler", path, key))
		case group == "queue.sidecar."+ServingGroup, strings.HasPrefix(key, ServingGroup+"/queueSidecar"), strings.HasPrefix(key, ServingGroup+"/queue-sidecar"):
			u.lines = append(u.lines, fmt.Sprintf("%s[%s]: the queue-proxy has no resources of its own", path, key))
		case group == NetworkingGroup:
			u.lines = append(u.lines, fmt.Sprintf("%s[%s]: the annotation has no effect", path, key))
		}
	}
}

func knownScaling(name string) bool {
	for _, spellings := range scalingSpellings {
		if slices.Contains(spellings, name) {
			return true
		}
	}
	return false
}
