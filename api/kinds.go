package api

// Kind describes one kind of object: how it is named on the wire and how to make an empty one.
type Kind struct {
	Kind       string
	APIVersion string // group/version
	Plural     string
	Singular   string
	ShortNames []string
	New        func() Object
}

// The kinds of this package.
var (
	Services       = &Kind{"Service", ServingV1, "services", "service", []string{"kservice", "ksvc"}, func() Object { return new(Service) }}
	Configurations = &Kind{"Configuration", ServingV1, "configurations", "configuration", []string{"config", "cfg"}, func() Object { return new(Configuration) }}
	Revisions      = &Kind{"Revision", ServingV1, "revisions", "revision", []string{"rev"}, func() Object { return new(Revision) }}
	Routes         = &Kind{"Route", ServingV1, "routes", "route", []string{"rt"}, func() Object { return new(Route) }}
	DomainMappings = &Kind{"DomainMapping", ServingV1beta1, "domainmappings", "domainmapping", []string{"dm"}, func() Object { return new(DomainMapping) }}

	VPCs       = &Kind{"VPC", NetV1alpha1, "vpcs", "vpc", nil, func() Object { return new(VPC) }}
	Subnets    = &Kind{"Subnet", NetV1alpha1, "subnets", "subnet", []string{"sn"}, func() Object { return new(Subnet) }}
	Gateways   = &Kind{"Gateway", NetV1alpha1, "gateways", "gateway", []string{"gw"}, func() Object { return new(Gateway) }}
	ElasticIPs = &Kind{"ElasticIP", NetV1alpha1, "elasticips", "elasticip", []string{"eip"}, func() Object { return new(ElasticIP) }}
)

// Kinds lists them in the order in which discovery names them.
var Kinds = []*Kind{Services, Configurations, Revisions, Routes, DomainMappings, VPCs, Subnets, Gateways, ElasticIPs}
