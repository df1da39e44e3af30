package api

import (
	"encoding/json"
	"time"
)

// Groups and versions of the objects in this package.
const (
	ServingGroup   = "serving.knative.dev"
	ServingV1      = "serving.knative.dev/v1"
	ServingV1beta1 = "serving.knative.dev/v1beta1"
)

// RevisionID names one revision in all namespaces: "namespace/name". It is the key of every table on the data path.
type RevisionID string

// MakeRevisionID joins a namespace and a revision name.
func MakeRevisionID(namespace, name string) RevisionID {
	return RevisionID(namespace + "/" + name)
}

// Split returns the namespace and the name of the revision; without a slash the namespace is empty.
func (id RevisionID) Split() (namespace, name string) {
	for i := range len(id) {
		if id[i] == '/' {
			return string(id[:i]), string(id[i+1:])
		}
	}
	return "", string(id)
}

// TypeMeta says what an object is, as every Kubernetes object does.
type TypeMeta struct {
	Kind       string `json:"kind,omitempty"`
	APIVersion string `json:"apiVersion,omitempty"`
}

// ObjectMeta is the part of Kubernetes' object metadata that Thaw keeps.
type ObjectMeta struct {
	Name              string            `json:"name,omitempty"`
	GenerateName      string            `json:"generateName,omitempty"`
	Namespace         string            `json:"namespace,omitempty"`
	UID               string            `json:"uid,omitempty"`
	ResourceVersion   string            `json:"resourceVersion,omitempty"` // the store's revision of the last write; never stored, always filled on read
	Generation        int64             `json:"generation,omitempty"`      // counts changes of spec
	CreationTimestamp *Time             `json:"creationTimestamp,omitempty"`
	DeletionTimestamp *Time             `json:"deletionTimestamp,omitempty"`
	Labels            map[string]string `json:"labels,omitempty"`
	Annotations       map[string]string `json:"annotations,omitempty"`
	OwnerReferences   []OwnerReference  `json:"ownerReferences,omitempty"`
	Finalizers        []string          `json:"finalizers,omitempty"`
}

// OwnerReference names the object that another one belongs to and is deleted with.
type OwnerReference struct {
	APIVersion         string `json:"apiVersion"`
	Kind               string `json:"kind"`
	Name               string `json:"name"`
	UID                string `json:"uid"`
	Controller         *bool  `json:"controller,omitempty"`
	BlockOwnerDeletion *bool  `json:"blockOwnerDeletion,omitempty"`
}

// Time is a time in the wire form of Kubernetes: RFC 3339, UTC, whole seconds.
type Time struct{ time.Time }

// MarshalJSON writes whole seconds in UTC; the zero time is null.
func (t Time) MarshalJSON() ([]byte, error) {
	if t.IsZero() {
		return []byte("null"), nil
	}
	return []byte(`"` + t.UTC().Format(time.RFC3339) + `"`), nil
}

// UnmarshalJSON takes RFC 3339 or null.
func (t *Time) UnmarshalJSON(b []byte) error {
	if string(b) == "null" {
		t.Time = time.Time{}
		return nil
	}
	var s string
	if err := json.Unmarshal(b, &s); err != nil {
		return err
	}
	v, err := time.Parse(time.RFC3339, s)
	if err != nil {
		return err
	}
	t.Time = v
	return nil
}

// Object is what every kind of this package is: typed metadata that the store and the API server can work on.
type Object interface {
	Type() *TypeMeta
	Meta() *ObjectMeta
}

// Service owns one Configuration and one Route of the same name: the object that people write.
type Service struct {
	TypeMeta   `json:",inline"`
	ObjectMeta `json:"metadata"`
	Spec       ServiceSpec   `json:"spec,omitzero"`
	Status     ServiceStatus `json:"status,omitzero"`
}

// ServiceSpec is a configuration's and a route's spec side by side.
type ServiceSpec struct {
	ConfigurationSpec `json:",inline"`
	RouteSpec         `json:",inline"`
}

// ServiceStatus mirrors what the configuration and the route say.
type ServiceStatus struct {
	Status                    `json:",inline"`
	ConfigurationStatusFields `json:",inline"`
	RouteStatusFields         `json:",inline"`
}

// Configuration holds the template of the next revision.
type Configuration struct {
	TypeMeta   `json:",inline"`
	ObjectMeta `json:"metadata"`
	Spec       ConfigurationSpec   `json:"spec,omitzero"`
	Status     ConfigurationStatus `json:"status,omitzero"`
}

// ConfigurationSpec has the template; each change of it stamps a revision.
type ConfigurationSpec struct {
	Template RevisionTemplate `json:"template,omitzero"`
}

// RevisionTemplate is a revision to be: its metadata (a name is optional) and its spec.
type RevisionTemplate struct {
	ObjectMeta `json:"metadata,omitzero"`
	Spec       RevisionSpec `json:"spec,omitzero"`
}

// ConfigurationStatus is the state of a configuration.
type ConfigurationStatus struct {
	Status                    `json:",inline"`
	ConfigurationStatusFields `json:",inline"`
}

// ConfigurationStatusFields names the newest revisions. LatestReady follows LatestCreated when that one gets ready.
type ConfigurationStatusFields struct {
	LatestReadyRevisionName   string `json:"latestReadyRevisionName,omitempty"`
	LatestCreatedRevisionName string `json:"latestCreatedRevisionName,omitempty"`
}

// Revision is an immutable snapshot of code and settings with its own instances.
type Revision struct {
	TypeMeta   `json:",inline"`
	ObjectMeta `json:"metadata"`
	Spec       RevisionSpec   `json:"spec,omitzero"`
	Status     RevisionStatus `json:"status,omitzero"`
}

// RevisionSpec is Kubernetes' PodSpec as far as Knative allows it, plus Knative's own fields. What is accepted but has no
// effect yet is kept as raw JSON, so that it round-trips; Unsupported names it.
type RevisionSpec struct {
	Containers                   []Container     `json:"containers"`
	ContainerConcurrency         *int64          `json:"containerConcurrency,omitempty"`        // hard limit of requests inside one instance; 0 = no limit
	TimeoutSeconds               *int64          `json:"timeoutSeconds,omitempty"`              // total, from the moment the function gets the request
	ResponseStartTimeoutSeconds  *int64          `json:"responseStartTimeoutSeconds,omitempty"` // until the first byte of the answer
	IdleTimeoutSeconds           *int64          `json:"idleTimeoutSeconds,omitempty"`          // between two bytes in either direction
	ServiceAccountName           string          `json:"serviceAccountName,omitempty"`
	EnableServiceLinks           *bool           `json:"enableServiceLinks,omitempty"`
	AutomountServiceAccountToken *bool           `json:"automountServiceAccountToken,omitempty"`
	ImagePullSecrets             json.RawMessage `json:"imagePullSecrets,omitempty"`
	Volumes                      json.RawMessage `json:"volumes,omitempty"`
}

// Container is Kubernetes' container as far as Knative allows it.
type Container struct {
	Name            string          `json:"name,omitempty"`
	Image           string          `json:"image,omitempty"`
	Command         []string        `json:"command,omitempty"`
	Args            []string        `json:"args,omitempty"`
	WorkingDir      string          `json:"workingDir,omitempty"`
	Ports           []ContainerPort `json:"ports,omitempty"`
	Env             []EnvVar        `json:"env,omitempty"`
	EnvFrom         json.RawMessage `json:"envFrom,omitempty"`
	Resources       Resources       `json:"resources,omitzero"`
	VolumeMounts    json.RawMessage `json:"volumeMounts,omitempty"`
	LivenessProbe   *Probe          `json:"livenessProbe,omitempty"`
	ReadinessProbe  *Probe          `json:"readinessProbe,omitempty"`
	StartupProbe    *Probe          `json:"startupProbe,omitempty"`
	ImagePullPolicy string          `json:"imagePullPolicy,omitempty"`
	SecurityContext json.RawMessage `json:"securityContext,omitempty"`

	TerminationMessagePath   string `json:"terminationMessagePath,omitempty"`
	TerminationMessagePolicy string `json:"terminationMessagePolicy,omitempty"`
}

// ContainerPort is the one port of a revision. Name is "h2c", "http1" or empty (= http1).
type ContainerPort struct {
	Name          string `json:"name,omitempty"`
	ContainerPort int32  `json:"containerPort,omitempty"`
	Protocol      string `json:"protocol,omitempty"`
}

// EnvVar is one variable; ValueFrom is reported as unsupported.
type EnvVar struct {
	Name      string          `json:"name"`
	Value     string          `json:"value,omitempty"`
	ValueFrom json.RawMessage `json:"valueFrom,omitempty"`
}

// Resources are Kubernetes quantities by resource name (cpu, memory, ephemeral-storage).
type Resources struct {
	Limits   map[string]Quantity `json:"limits,omitempty"`
	Requests map[string]Quantity `json:"requests,omitempty"`
}

// IsZero keeps empty maps from being written as an empty object, which would make two equal specs look different.
func (r Resources) IsZero() bool { return len(r.Limits) == 0 && len(r.Requests) == 0 }

// Probe is Kubernetes' probe. Exactly one of the four handlers is set after defaulting (TCP on the port).
type Probe struct {
	HTTPGet             *HTTPGetAction   `json:"httpGet,omitempty"`
	TCPSocket           *TCPSocketAction `json:"tcpSocket,omitempty"`
	Exec                *ExecAction      `json:"exec,omitempty"`
	GRPC                *GRPCAction      `json:"grpc,omitempty"`
	InitialDelaySeconds int32            `json:"initialDelaySeconds,omitempty"`
	TimeoutSeconds      int32            `json:"timeoutSeconds,omitempty"`
	PeriodSeconds       int32            `json:"periodSeconds,omitempty"` // 0 = as fast as is sensible
	SuccessThreshold    int32            `json:"successThreshold,omitempty"`
	FailureThreshold    int32            `json:"failureThreshold,omitempty"`

	TerminationGracePeriodSeconds *int64 `json:"terminationGracePeriodSeconds,omitempty"`
}

// HTTPGetAction succeeds on 200..399.
type HTTPGetAction struct {
	Path        string       `json:"path,omitempty"`
	Port        IntOrString  `json:"port,omitzero"`
	Host        string       `json:"host,omitempty"`
	Scheme      string       `json:"scheme,omitempty"`
	HTTPHeaders []HTTPHeader `json:"httpHeaders,omitempty"`
}

// HTTPHeader is a header that a probe sends.
type HTTPHeader struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// TCPSocketAction succeeds when the port can be connected to.
type TCPSocketAction struct {
	Port IntOrString `json:"port,omitzero"`
	Host string      `json:"host,omitempty"`
}

// ExecAction succeeds when the command exits with 0.
type ExecAction struct {
	Command []string `json:"command,omitempty"`
}

// GRPCAction succeeds when grpc.health.v1 answers SERVING.
type GRPCAction struct {
	Port    int32  `json:"port,omitempty"`
	Service string `json:"service,omitempty"`
}

// RevisionStatus is the state of a revision.
type RevisionStatus struct {
	Status            `json:",inline"`
	LogURL            string            `json:"logUrl,omitempty"`
	ContainerStatuses []ContainerStatus `json:"containerStatuses,omitempty"`
	ActualReplicas    *int32            `json:"actualReplicas,omitempty"`
	DesiredReplicas   *int32            `json:"desiredReplicas,omitempty"`
}

// ContainerStatus has the code's digest, in a form that is accepted as an image: never empty once resolved.
type ContainerStatus struct {
	Name        string `json:"name,omitempty"`
	ImageDigest string `json:"imageDigest,omitempty"`
}

// Route says which revisions get the requests of a name.
type Route struct {
	TypeMeta   `json:",inline"`
	ObjectMeta `json:"metadata"`
	Spec       RouteSpec   `json:"spec,omitzero"`
	Status     RouteStatus `json:"status,omitzero"`
}

// RouteSpec is the list of targets; their percentages sum to 100.
type RouteSpec struct {
	Traffic []TrafficTarget `json:"traffic,omitempty"`
}

// TrafficTarget is one share of a route: a named revision, or the latest ready one of a configuration.
type TrafficTarget struct {
	Tag               string `json:"tag,omitempty"`
	RevisionName      string `json:"revisionName,omitempty"`
	ConfigurationName string `json:"configurationName,omitempty"`
	LatestRevision    *bool  `json:"latestRevision,omitempty"`
	Percent           *int64 `json:"percent,omitempty"`
	URL               string `json:"url,omitempty"` // status only, for tagged targets
}

// RouteStatus is the state of a route.
type RouteStatus struct {
	Status            `json:",inline"`
	RouteStatusFields `json:",inline"`
}

// RouteStatusFields is where a route can be reached and what really gets its traffic.
type RouteStatusFields struct {
	URL     string          `json:"url,omitempty"`
	Address *Addressable    `json:"address,omitempty"`
	Traffic []TrafficTarget `json:"traffic,omitempty"`
}

// Addressable is an address inside the installation.
type Addressable struct {
	URL string `json:"url,omitempty"`
}

// DomainMapping (v1beta1) sends all requests for the host that is its name to one service.
type DomainMapping struct {
	TypeMeta   `json:",inline"`
	ObjectMeta `json:"metadata"`
	Spec       DomainMappingSpec   `json:"spec,omitzero"`
	Status     DomainMappingStatus `json:"status,omitzero"`
}

// DomainMappingSpec names the service. TLS is kept but not honoured yet.
type DomainMappingSpec struct {
	Ref Reference       `json:"ref,omitzero"`
	TLS json.RawMessage `json:"tls,omitempty"`
}

// Reference names another object.
type Reference struct {
	Kind       string `json:"kind,omitempty"`
	Namespace  string `json:"namespace,omitempty"`
	Name       string `json:"name,omitempty"`
	APIVersion string `json:"apiVersion,omitempty"`
}

// DomainMappingStatus is the state of a domain mapping.
type DomainMappingStatus struct {
	Status  `json:",inline"`
	URL     string       `json:"url,omitempty"`
	Address *Addressable `json:"address,omitempty"`
}

// Status is what the status of every kind begins with.
type Status struct {
	ObservedGeneration int64             `json:"observedGeneration,omitempty"`
	Conditions         Conditions        `json:"conditions,omitempty"`
	Annotations        map[string]string `json:"annotations,omitempty"`
}

// Conditions are kept sorted by type.
type Conditions []Condition

// Condition is one statement about an object: "True", "False" or "Unknown", and why.
type Condition struct {
	Type               string `json:"type"`
	Status             string `json:"status"`
	Severity           string `json:"severity,omitempty"` // "" = error, "Warning", "Info"
	LastTransitionTime Time   `json:"lastTransitionTime,omitzero"`
	Reason             string `json:"reason,omitempty"`
	Message            string `json:"message,omitempty"`
}

// Type and Meta make every kind an Object.

func (t *TypeMeta) Type() *TypeMeta     { return t }
func (m *ObjectMeta) Meta() *ObjectMeta { return m }
