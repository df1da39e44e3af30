package apiserver

import (
	"net/url"
	"strconv"
	"strings"

	"github.com/thawrun/thaw/api"
)

// table is meta.k8s.io/v1 Table: what kubectl prints.
type table struct {
	Kind       string        `json:"kind"`
	APIVersion string        `json:"apiVersion"`
	Metadata   listMeta      `json:"metadata"`
	Columns    []tableColumn `json:"columnDefinitions"`
	Rows       []tableRow    `json:"rows"`
}

type tableColumn struct {
	Name        string `json:"name"`
	Type        string `json:"type"`
	Format      string `json:"format"`
	Description string `json:"description"`
	Priority    int    `json:"priority"`
}

type tableRow struct {
	Cells  []any `json:"cells"`
	Object any   `json:"object,omitempty"`
}

// partial is the metadata of an object alone.
type partial struct {
	Kind       string          `json:"kind"`
	APIVersion string          `json:"apiVersion"`
	Metadata   *api.ObjectMeta `json:"metadata"`
}

// column is one column and how an object fills it; a nil cell prints as nothing.
type column struct {
	tableColumn
	cell func(api.Object) any
}

func textColumn(name, description string, cell func(api.Object) any) column {
	return column{tableColumn{Name: name, Type: "string", Description: description}, cell}
}

var nameColumn = column{
	tableColumn{Name: "Name", Type: "string", Format: "name", Description: "Name of the object, unique in its namespace."},
	func(o api.Object) any { return o.Meta().Name },
}

var readyColumns = []column{
	textColumn("Ready", "Status of the Ready condition.", func(o api.Object) any {
		if c := readyOf(o); c != nil {
			return orNil(c.Status)
		}
		return nil
	}),
	textColumn("Reason", "Why it is not ready.", func(o api.Object) any {
		if c := readyOf(o); c != nil {
			return orNil(c.Reason)
		}
		return nil
	}),
}

func readyOf(o api.Object) *api.Condition {
	if st := api.StatusOf(o); st != nil {
		return st.Conditions.Get(api.ConditionReady)
	}
	return nil
}

func orNil(s string) any {
	if s == "" {
		return nil
	}
	return s
}

func replicas(n *int32) any {
	if n == nil {
		return nil
	}
	return *n
}

// columnsOf returns the columns of a kind; Knative's where it has the kind.
func columnsOf(k *api.Kind) []column {
	cols := []column{nameColumn}
	url := func(get func(api.Object) string) column {
		return textColumn("URL", "Where it can be called.", func(o api.Object) any { return orNil(get(o)) })
	}
	latest := func(get func(api.Object) *api.ConfigurationStatusFields) []column {
		return []column{
			textColumn("LatestCreated", "Newest revision.", func(o api.Object) any { return orNil(get(o).LatestCreatedRevisionName) }),
			textColumn("LatestReady", "Newest revision that is ready.", func(o api.Object) any { return orNil(get(o).LatestReadyRevisionName) }),
		}
	}
	switch k {
	case api.Services:
		cols = append(cols, url(func(o api.Object) string { return o.(*api.Service).Status.URL }))
		cols = append(cols, latest(func(o api.Object) *api.ConfigurationStatusFields {
			return &o.(*api.Service).Status.ConfigurationStatusFields
		})...)
	case api.Configurations:
		cols = append(cols, latest(func(o api.Object) *api.ConfigurationStatusFields {
			return &o.(*api.Configuration).Status.ConfigurationStatusFields
		})...)
	case api.Routes:
		cols = append(cols, url(func(o api.Object) string { return o.(*api.Route).Status.URL }))
	case api.DomainMappings:
		cols = append(cols, url(func(o api.Object) string { return o.(*api.DomainMapping).Status.URL }))
	case api.VPCs:
		cols = append(cols,
			textColumn("CIDRs", "Ranges that its subnets lie in.", func(o api.Object) any { return orNil(strings.Join(o.(*api.VPC).Spec.CIDRs, ",")) }),
			textColumn("Subnets", "Its subnets.", func(o api.Object) any { return orNil(strings.Join(o.(*api.VPC).Status.Subnets, ",")) }))
	case api.Subnets:
		cols = append(cols,
			textColumn("VPC", "Its VPC.", func(o api.Object) any { return orNil(o.(*api.Subnet).Spec.VPC) }),
			column{tableColumn{Name: "Key", Type: "integer", Description: "What its packets carry in tunnels."},
				func(o api.Object) any { return o.(*api.Subnet).Status.Key }},
			textColumn("CIDR", "Its addresses.", func(o api.Object) any { return orNil(o.(*api.Subnet).Spec.CIDR) }),
			textColumn("HAVIPs", "Addresses that functions are seen under.", func(o api.Object) any { return orNil(strings.Join(o.(*api.Subnet).Status.HAVIPs, ",")) }),
			textColumn("Gateway", "Its pair of gateways.", func(o api.Object) any { return orNil(o.(*api.Subnet).Status.Gateway) }))
	case api.Gateways:
		cols = append(cols,
			textColumn("Subnet", "The subnet that it leads to.", func(o api.Object) any { return orNil(o.(*api.Gateway).Spec.Subnet) }),
			textColumn("HAVIPs", "Addresses that functions are seen under.", func(o api.Object) any { return orNil(strings.Join(o.(*api.Gateway).Status.HAVIPs, ",")) }),
			textColumn("State", "State of the pair.", func(o api.Object) any { return orNil(o.(*api.Gateway).Status.State) }),
			textColumn("Master", "Node of the member that carries the traffic.", func(o api.Object) any { return orNil(o.(*api.Gateway).Master()) }))
	case api.ElasticIPs:
		cols = append(cols,
			textColumn("Address", "The public address.", func(o api.Object) any { return orNil(o.(*api.ElasticIP).Spec.Address) }),
			textColumn("Subnet", "What it is bound to.", func(o api.Object) any { return orNil(o.(*api.ElasticIP).Spec.Subnet) }),
			textColumn("HAVIP", "Address in the subnet.", func(o api.Object) any { return orNil(o.(*api.ElasticIP).Status.HAVIP) }))
	case api.Revisions:
		cols = append(cols,
			textColumn("Config Name", "Configuration that stamped it.", func(o api.Object) any { return orNil(o.Meta().Labels[api.LabelConfiguration]) }),
			textColumn("Generation", "Generation of the configuration that stamped it.", func(o api.Object) any { return orNil(o.Meta().Labels[api.LabelConfigurationGeneration]) }))
		cols = append(cols, readyColumns...)
		number := func(name, description string, get func(*api.RevisionStatus) *int32) column {
			return column{tableColumn{Name: name, Type: "integer", Description: description},
				func(o api.Object) any { return replicas(get(&o.(*api.Revision).Status)) }}
		}
		return append(cols,
			number("Actual Replicas", "Instances that are ready.", func(s *api.RevisionStatus) *int32 { return s.ActualReplicas }),
			number("Desired Replicas", "Instances that should be.", func(s *api.RevisionStatus) *int32 { return s.DesiredReplicas }))
	}
	return append(cols, readyColumns...)
}

// include says what of an object goes into its row.
type include string

func parseInclude(query url.Values) (include, error) {
	switch v := query.Get("includeObject"); v {
	case "", "Metadata":
		return "Metadata", nil
	case "None", "Object":
		return include(v), nil
	default:
		return "", invalidOptions("TableOptions", "includeObject", v, "Metadata", "None", "Object")
	}
}

// newTable makes a table of objects of one kind.
func newTable(k *api.Kind, meta listMeta, list []api.Object, inc include) *table {
	cols := columnsOf(k)
	t := &table{Kind: "Table", APIVersion: "meta.k8s.io/v1", Metadata: meta, Rows: []tableRow{}, Columns: make([]tableColumn, len(cols))}
	for i, c := range cols {
		t.Columns[i] = c.tableColumn
	}
	for _, o := range list {
		row := tableRow{Cells: make([]any, len(cols))}
		for i, c := range cols {
			row.Cells[i] = c.cell(o)
		}
		switch inc {
		case "Metadata":
			row.Object = partial{"PartialObjectMetadata", "meta.k8s.io/v1", o.Meta()}
		case "Object":
			row.Object = o
		}
		t.Rows = append(t.Rows, row)
	}
	return t
}

func formatRevision(rev int64) string { return strconv.FormatInt(rev, 10) }
