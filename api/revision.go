package api

import "time"

// What holds where a revision says nothing.
const (
	DefaultPort           = 8080
	DefaultTimeoutSeconds = 300
	DefaultContainerName  = "user-container"

	ProtocolHTTP1 = "http1"
	ProtocolH2C   = "h2c"
)

// ID names the revision on the data path.
func (r *Revision) ID() RevisionID { return MakeRevisionID(r.Namespace, r.Name) }

// Serving returns the container that takes the requests: the only one, or of several the one with a port. It is nil when
// there is none, which Validate refuses. The container is shared with r: do not modify it.
func (r *Revision) Serving() *Container { return r.Spec.serving() }

func (s *RevisionSpec) serving() *Container {
	if len(s.Containers) == 1 {
		return &s.Containers[0]
	}
	for i := range s.Containers {
		if len(s.Containers[i].Ports) > 0 {
			return &s.Containers[i]
		}
	}
	return nil
}

// Port is the port that the function listens on; 8080 when the spec names none.
func (r *Revision) Port() int32 {
	if c := r.Serving(); c != nil && len(c.Ports) > 0 && c.Ports[0].ContainerPort != 0 {
		return c.Ports[0].ContainerPort
	}
	return DefaultPort
}

// Protocol is what the function speaks on its port: ProtocolHTTP1 or ProtocolH2C.
func (r *Revision) Protocol() string {
	if c := r.Serving(); c != nil && len(c.Ports) > 0 && c.Ports[0].Name == ProtocolH2C {
		return ProtocolH2C
	}
	return ProtocolHTTP1
}

// Concurrency is how many requests one instance takes at once; 0 = no limit.
func (r *Revision) Concurrency() int {
	if c := r.Spec.ContainerConcurrency; c != nil && *c > 0 {
		return int(*c)
	}
	return 0
}

// Timeouts returns the limits of one request: in total, until the first byte of the answer, and between two bytes. 0 = no
// such limit; only total has a default. None of them counts the time that a request waits for an instance.
func (r *Revision) Timeouts() (total, responseStart, idle time.Duration) {
	seconds := func(p *int64) time.Duration {
		if p == nil || *p <= 0 {
			return 0
		}
		return time.Duration(*p) * time.Second
	}
	if total = seconds(r.Spec.TimeoutSeconds); total == 0 {
		total = DefaultTimeoutSeconds * time.Second // Knative reads 0 as "the default", too
	}
	return total, seconds(r.Spec.ResponseStartTimeoutSeconds), seconds(r.Spec.IdleTimeoutSeconds)
}

// ServiceName is the Service that the revision belongs to; empty for a Configuration that stands alone.
func (r *Revision) ServiceName() string { return r.Labels[LabelService] }

// ConfigurationName is the Configuration that stamped the revision.
func (r *Revision) ConfigurationName() string { return r.Labels[LabelConfiguration] }

// Ready says whether requests may be sent to the revision: its condition Ready is True for the spec as it is now.
func (r *Revision) Ready() bool { return r.Status.Conditions.IsTrue(ConditionReady) }
