package api

import "strconv"

// SetDefaults fills what Knative fills in when an object is written, in place. Doing it twice changes nothing more.
func SetDefaults(o Object) {
	if k := KindOf(o); k != nil {
		*o.Type() = TypeMeta{Kind: k.Kind, APIVersion: k.APIVersion}
	}
	switch v := o.(type) {
	case *Service:
		v.Spec.Template.Spec.setDefaults()
		v.Spec.RouteSpec.setDefaults(true)
	case *Configuration:
		v.Spec.Template.Spec.setDefaults()
	case *Revision:
		v.Spec.setDefaults()
	case *Route:
		v.Spec.setDefaults(false)
	case *DomainMapping:
		v.Spec.Ref.setDefaults(v.Namespace)
	}
}

func ptr[T any](v T) *T { return &v }

func (s *RevisionSpec) setDefaults() {
	if s.TimeoutSeconds == nil || *s.TimeoutSeconds == 0 {
		s.TimeoutSeconds = ptr(int64(DefaultTimeoutSeconds))
	}
	// The default (300) is written down only where it limits anything.
	if s.ResponseStartTimeoutSeconds == nil && *s.TimeoutSeconds > DefaultTimeoutSeconds {
		s.ResponseStartTimeoutSeconds = ptr(int64(DefaultTimeoutSeconds))
	}
	if s.ContainerConcurrency == nil {
		s.ContainerConcurrency = ptr(int64(0))
	}
	if s.EnableServiceLinks == nil {
		s.EnableServiceLinks = ptr(false)
	}
	s.nameContainers()
	serving := s.serving()
	for i := range s.Containers {
		c := &s.Containers[i]
		c.setDefaults(c == serving)
	}
}

// nameContainers gives names to containers without one: user-container, or user-container-0, -1, … when there are several,
// leaving out names that are taken.
func (s *RevisionSpec) nameContainers() {
	taken := map[string]bool{}
	for i := range s.Containers {
		taken[s.Containers[i].Name] = true
	}
	n := 0
	for i := range s.Containers {
		c := &s.Containers[i]
		if c.Name != "" {
			continue
		}
		c.Name = DefaultContainerName
		if len(s.Containers) > 1 {
			for {
				c.Name = DefaultContainerName + "-" + strconv.Itoa(n)
				n++
				if !taken[c.Name] {
					break
				}
			}
		}
		taken[c.Name] = true
	}
}

func (c *Container) setDefaults(serving bool) {
	for i := range c.Ports {
		if c.Ports[i].Protocol == "" {
			c.Ports[i].Protocol = "TCP"
		}
	}
	if serving {
		if c.ReadinessProbe == nil {
			c.ReadinessProbe = &Probe{}
		}
		if !c.ReadinessProbe.hasHandler() {
			c.ReadinessProbe.TCPSocket = &TCPSocketAction{}
		}
	}
	if c.ReadinessProbe != nil {
		c.ReadinessProbe.setDefaults()
	}
}

// setDefaults is for readiness probes only. Liveness and startup probes stay as written, as in Knative, where Kubernetes
// gives them their defaults when a pod is made.
func (p *Probe) setDefaults() {
	if p.SuccessThreshold == 0 {
		p.SuccessThreshold = 1
	}
	// Without a period a probe is repeated as fast as is sensible, and the other two mean nothing.
	if p.PeriodSeconds != 0 {
		if p.FailureThreshold == 0 {
			p.FailureThreshold = 3
		}
		if p.TimeoutSeconds == 0 {
			p.TimeoutSeconds = 1
		}
	}
}

func (p *Probe) hasHandler() bool {
	return p.HTTPGet != nil || p.TCPSocket != nil || p.Exec != nil || p.GRPC != nil
}

// setDefaults gives a Service everything to its latest revision; a Route that names no target has none.
func (s *RouteSpec) setDefaults(service bool) {
	if len(s.Traffic) == 0 && service {
		s.Traffic = []TrafficTarget{{LatestRevision: ptr(true), Percent: ptr(int64(100))}}
	}
	for i := range s.Traffic {
		t := &s.Traffic[i]
		if t.LatestRevision == nil {
			t.LatestRevision = ptr(t.RevisionName == "")
		}
		if t.Percent == nil {
			t.Percent = ptr(int64(0))
		}
	}
}

func (r *Reference) setDefaults(namespace string) {
	if r.Namespace == "" {
		r.Namespace = namespace
	}
}
