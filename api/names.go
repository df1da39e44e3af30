package api

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// Groups that annotations and labels belong to.
const (
	AutoscalingGroup = "autoscaling.knative.dev"
	NetworkingGroup  = "networking.knative.dev"
	InstanceGroup    = "instance.thaw.run"
	ThawGroup        = "thaw.run"
	RouteGroup       = "route." + ThawGroup
	QueueGroup       = "queue." + ThawGroup
	NetGroup         = "net." + ThawGroup
)

// Labels. The first four are set by the platform and say what an object belongs to.
const (
	LabelService                 = ServingGroup + "/service"
	LabelServiceUID              = ServingGroup + "/serviceUID"
	LabelConfiguration           = ServingGroup + "/configuration"
	LabelConfigurationUID        = ServingGroup + "/configurationUID"
	LabelConfigurationGeneration = ServingGroup + "/configurationGeneration"
	LabelRevision                = ServingGroup + "/revision"
	LabelRevisionUID             = ServingGroup + "/revisionUID"
	LabelRoute                   = ServingGroup + "/route"
	LabelRoutingState            = ServingGroup + "/routingState" // RoutingStatePending, RoutingStateActive or RoutingStateReserve
	LabelVisibility              = NetworkingGroup + "/visibility"
)

// Values of LabelRoutingState.
const (
	RoutingStatePending = "pending" // just made; no route has looked at it yet
	RoutingStateActive  = "active"  // a route leads to it
	RoutingStateReserve = "reserve" // no route leads to it; garbage collection may take it
)

// VisibilityClusterLocal is the only value of LabelVisibility: served to requests from inside only.
const VisibilityClusterLocal = "cluster-local"

// Annotations of serving.knative.dev and its neighbours.
const (
	AnnotationCreator              = ServingGroup + "/creator"      // set by the API server
	AnnotationLastModifier         = ServingGroup + "/lastModifier" // set by the API server
	AnnotationRolloutDuration      = ServingGroup + "/rollout-duration"
	AnnotationRolloutInProgress    = ServingGroup + "/rolloutInProgress" // state of a gradual rollout
	AnnotationProgressDeadline     = ServingGroup + "/progress-deadline"
	AnnotationNoGC                 = ServingGroup + "/no-gc"
	AnnotationForceUpgrade         = ServingGroup + "/forceUpgrade"
	AnnotationRoutes               = ServingGroup + "/routes"               // on a revision: the routes that lead to it, joined by commas
	AnnotationRoutingStateModified = ServingGroup + "/routingStateModified" // RFC 3339
	AnnotationFullDuplex           = "features.knative.dev/http-full-duplex"
	AnnotationLastApplied          = "kubectl.kubernetes.io/last-applied-configuration"
	AnnotationPlanner              = "autoscaling." + ThawGroup + "/planner"      // "kpa" or "predictive": who decides what is kept and started ahead
	AnnotationEventDriven          = "autoscaling." + ThawGroup + "/event-driven" // "true" or "false": size the first decision from the queue
	AnnotationSocket               = InstanceGroup + "/socket"                    // "fd3": the function gets its listening socket on descriptor 3
	AnnotationReady                = InstanceGroup + "/ready"                     // "fd4": the function writes a byte to descriptor 4 when it is ready
	AnnotationNetwork              = InstanceGroup + "/network"                   // "host": a sandbox shares the machine's network
	AnnotationFrozenFor            = InstanceGroup + "/frozen-for"                // a duration that an idle instance is kept frozen; "0s": it is not
	AnnotationFrozenMax            = InstanceGroup + "/frozen-max"                // how many instances of the revision are, at most

	// Of a template or a revision.
	AnnotationSticky           = RouteGroup + "/sticky"       // "cookie" or "header:NAME"
	AnnotationSlowStart        = RouteGroup + "/slow-start"   // a duration
	AnnotationQueueMaxRequests = QueueGroup + "/max-requests" // held requests
	AnnotationQueueMaxBytes    = QueueGroup + "/max-bytes"    // a quantity
	AnnotationQueueMaxWait     = QueueGroup + "/max-wait"     // a duration
	AnnotationSubnet           = NetGroup + "/subnet"         // "VPC/SUBNET": the function's private network
	AnnotationEgress           = NetGroup + "/egress"         // "none", "shared" or "fixed"

	// Of a Service, a Route or a DomainMapping; durations. The shorter of these and the revision's own counts.
	AnnotationTimeout              = RouteGroup + "/timeout"
	AnnotationResponseStartTimeout = RouteGroup + "/response-start-timeout"
	AnnotationIdleTimeout          = RouteGroup + "/idle-timeout"
)

// SocketFD3 is the only value of AnnotationSocket.
const SocketFD3 = "fd3"

// ReadyFD4 and NetworkHost are the only values of AnnotationReady and AnnotationNetwork.
const (
	ReadyFD4    = "fd4"
	NetworkHost = "host"
)

// Suffixes of the annotations under autoscaling.knative.dev/, in kebab case; ScalingAnnotation reads both spellings.
const (
	ScalingClass              = "class"
	ScalingMetric             = "metric"
	ScalingMetricAggregation  = "metric-aggregation-algorithm"
	ScalingMin                = "min-scale"
	ScalingMax                = "max-scale"
	ScalingInitial            = "initial-scale"
	ScalingActivation         = "activation-scale"
	ScalingDownDelay          = "scale-down-delay"
	ScalingRetention          = "scale-to-zero-pod-retention-period"
	ScalingTarget             = "target"
	ScalingTargetUtilization  = "target-utilization-percentage"
	ScalingTargetBurst        = "target-burst-capacity"
	ScalingWindow             = "window"
	ScalingPanicWindow        = "panic-window-percentage"
	ScalingPanicThreshold     = "panic-threshold-percentage"
	ScalingClassKPA           = "kpa.autoscaling.knative.dev"
	ScalingClassHPA           = "hpa.autoscaling.knative.dev"
	ScalingMetricConcurrency  = "concurrency"
	ScalingMetricRPS          = "rps"
	ScalingAggregationLinear  = "linear"
	ScalingAggregationWeights = "weighted-exponential"

	ScalingAggregationWeightsAlt = "weightedExponential" // the older spelling of the same
)

// scalingSpellings are the names under autoscaling.knative.dev/ that Knative reads for a suffix, the preferred one first.
var scalingSpellings = map[string][]string{
	ScalingClass:             {"class"},
	ScalingMetric:            {"metric"},
	ScalingMetricAggregation: {"metric-aggregation-algorithm", "metricAggregationAlgorithm"},
	ScalingMin:               {"min-scale", "minScale"},
	ScalingMax:               {"max-scale", "maxScale"},
	ScalingInitial:           {"initial-scale", "initialScale"},
	ScalingActivation:        {"activation-scale", "activationScale"},
	ScalingDownDelay:         {"scale-down-delay", "scaleDownDelay"},
	ScalingRetention:         {"scale-to-zero-pod-retention-period", "scaleToZeroPodRetentionPeriod"},
	ScalingTarget:            {"target"},
	ScalingTargetUtilization: {"target-utilization-percentage", "targetUtilizationPercentage"},
	ScalingTargetBurst:       {"target-burst-capacity", "targetBurstCapacity"},
	ScalingWindow:            {"window"},
	ScalingPanicWindow:       {"panic-window-percentage", "panicWindowPercentage"},
	ScalingPanicThreshold:    {"panic-threshold-percentage", "panicThresholdPercentage"},
}

// ScalingAnnotation returns the value of the annotation autoscaling.knative.dev/<suffix>. The suffix is written in kebab
// case (one of the Scaling constants); the older camelCase spelling counts when the kebab one is absent.
func ScalingAnnotation(ann map[string]string, suffix string) (string, bool) {
	_, v, ok := findScaling(ann, suffix)
	return v, ok
}

// findScaling is ScalingAnnotation with the key as it was written, for error messages.
func findScaling(ann map[string]string, suffix string) (key, value string, ok bool) {
	if len(ann) == 0 {
		return "", "", false // keys are not put together for nothing
	}
	for _, s := range scalingSpellings[suffix] {
		if v, ok := ann[AutoscalingGroup+"/"+s]; ok {
			return AutoscalingGroup + "/" + s, v, true
		}
	}
	return "", "", false
}

// Condition types.
const (
	ConditionReady                  = "Ready"
	ConditionConfigurationsReady    = "ConfigurationsReady" // Service
	ConditionRoutesReady            = "RoutesReady"         // Service
	ConditionResourcesAvailable     = "ResourcesAvailable"  // Revision
	ConditionContainerHealthy       = "ContainerHealthy"    // Revision
	ConditionActive                 = "Active"              // Revision; severity Info: not counted in Ready
	ConditionAllTrafficAssigned     = "AllTrafficAssigned"  // Route
	ConditionIngressReady           = "IngressReady"        // Route, DomainMapping
	ConditionCertificateProvisioned = "CertificateProvisioned"
	ConditionDomainClaimed          = "DomainClaimed"     // DomainMapping
	ConditionReferenceResolved      = "ReferenceResolved" // DomainMapping
	ConditionNetworkReady           = "NetworkReady"      // Revision with a subnet
	ConditionKeyAllocated           = "KeyAllocated"      // Subnet
	ConditionVPCReady               = "VPCReady"          // Subnet
	ConditionHAVIPsAllocated        = "HAVIPsAllocated"   // Subnet
	ConditionSubnetReady            = "SubnetReady"       // Gateway, ElasticIP
	ConditionMembersActive          = "MembersActive"     // Gateway
	ConditionBound                  = "Bound"             // ElasticIP; severity Info: not counted in Ready
	ConditionFieldsHonoured         = "FieldsHonoured"    // severity Warning: fields of the spec are accepted but have no effect yet
)

// Values of Condition.Status and Condition.Severity.
const (
	True    = "True"
	False   = "False"
	Unknown = "Unknown"

	SeverityError   = ""
	SeverityWarning = "Warning"
	SeverityInfo    = "Info"
)

// Reasons in conditions, Knative's words where it has one.
const (
	ReasonDeploying                = "Deploying"
	ReasonContainerMissing         = "ContainerMissing" // the image cannot be resolved
	ReasonResolvingDigests         = "ResolvingDigests"
	ReasonProgressDeadlineExceeded = "ProgressDeadlineExceeded"
	ReasonNoTraffic                = "NoTraffic"
	ReasonRevisionFailed           = "RevisionFailed"
	ReasonRevisionMissing          = "RevisionMissing"
	ReasonConfigurationMissing     = "ConfigurationMissing"
	ReasonNotOwned                 = "NotOwned"
	ReasonNotReconciled            = "NotReconciled"
	ReasonTLSNotEnabled            = "TLSNotEnabled"
	ReasonUnsupportedFields        = "UnsupportedFields"
	ReasonVPCMissing               = "VPCMissing"
	ReasonSubnetMissing            = "SubnetMissing"
	ReasonSubnetNotReady           = "SubnetNotReady"
	ReasonGatewayNotReady          = "GatewayNotReady"
	ReasonElasticIPMissing         = "ElasticIPMissing"
	ReasonOverlap                  = "Overlap"   // with an older object
	ReasonExhausted                = "Exhausted" // no free key or address
	ReasonNoNetwork                = "NoNetwork" // this installation cannot make gateways
	ReasonCreatingGateway          = "CreatingGateway"
	ReasonGatewayFailed            = "GatewayFailed"
	ReasonNotBound                 = "NotBound"
)

// ReadyDependents returns the condition types that a kind's Ready is made of, as Knative counts them; a revision with a subnet
// has ConditionNetworkReady besides. For each that is absent, Ready is Unknown.
func ReadyDependents(k *Kind) []string {
	switch k {
	case Services:
		return []string{ConditionConfigurationsReady, ConditionRoutesReady}
	case Revisions:
		return []string{ConditionContainerHealthy, ConditionResourcesAvailable}
	case Routes:
		return []string{ConditionAllTrafficAssigned, ConditionCertificateProvisioned, ConditionIngressReady}
	case DomainMappings:
		return []string{ConditionCertificateProvisioned, ConditionDomainClaimed, ConditionIngressReady, ConditionReferenceResolved}
	case Subnets:
		return []string{ConditionHAVIPsAllocated, ConditionKeyAllocated, ConditionVPCReady}
	case Gateways:
		return []string{ConditionMembersActive, ConditionSubnetReady}
	case ElasticIPs:
		return []string{ConditionSubnetReady}
	}
	return nil // a configuration's and a VPC's Ready stand alone
}

// GenerateName names the revision of a configuration's generation when the template gives no name: hello-00001. A
// configuration's name may have 63 characters, and so may a revision's; a name that gets too long is cut and made unique
// again by a hash of the whole.
func GenerateName(configuration string, generation int64) string {
	suffix := fmt.Sprintf("-%05d", generation)
	if len(configuration)+len(suffix) <= maxLabel {
		return configuration + suffix
	}
	sum := sha256.Sum256([]byte(configuration))
	hash := hex.EncodeToString(sum[:16])
	return configuration[:maxLabel-len(hash)-len(suffix)] + hash + suffix
}
