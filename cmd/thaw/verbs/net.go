package verbs

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
)

// netCommands are the verbs about tenants' networks.
func netCommands(env *Env) []*cobra.Command {
	return []*cobra.Command{
		netCommand(env, netVerb{kind: api.VPCs, word: "vpc", short: "Private networks of tenants", create: createVPC,
			long: `A VPC is a private network of a namespace: what is inside one never meets what is inside another, whatever the addresses.`}),
		netCommand(env, netVerb{kind: api.Subnets, word: "subnet", short: "Parts of a VPC that functions can join", create: createSubnet,
			long: `A subnet is a part of a VPC that gateways get into by a bridge or a NIC of their nodes. A function joins it by the annotation
net.thaw.run/subnet: VPC/SUBNET of its template.`}),
		netCommand(env, netVerb{kind: api.Gateways, word: "gateway", aliases: []string{"gw"}, short: "Pairs of gateways between functions and a subnet", create: createGateway,
			long: `A gateway is a pair: one member carries the traffic, the other has a copy of its connections. The platform makes one with the first function
of a subnet and removes it an hour after the last one; one that you create stays.`}),
		netCommand(env, netVerb{kind: api.ElasticIPs, word: "eip", aliases: []string{"elasticip"}, short: "Public addresses of subnets", create: createElasticIP,
			long: `An elastic IP is a public address bound to a subnet: functions with the annotation net.thaw.run/egress: fixed are seen under it outside.`}),
	}
}

// netVerb is what differs between them.
type netVerb struct {
	kind              *api.Kind
	word, short, long string
	aliases           []string
	// create registers the flags of an object and returns what makes it when they are read.
	create func(*cobra.Command) (make func(name string) api.Object)
}

func netCommand(env *Env, v netVerb) *cobra.Command {
	cmd := &cobra.Command{Use: v.word, Aliases: v.aliases, Short: v.short, Long: v.long, Args: cobra.NoArgs}
	cmd.AddCommand(netCreate(env, v), netList(env, v), netDescribe(env, v), netDelete(env, v))
	return cmd
}

func netCreate(env *Env, v netVerb) *cobra.Command {
	s := &session{Env: env}
	var wait waitFlags
	cmd := &cobra.Command{Use: "create NAME", Short: "Create a " + v.word, Args: exactArgs("NAME")}
	build := v.create(cmd)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := s.open(); err != nil {
			return err
		}
		o := build(args[0])
		o.Meta().Name, o.Meta().Namespace = args[0], s.namespace
		if _, err := s.client.Create(cmd.Context(), v.kind, o); err != nil {
			return err
		}
		fmt.Fprintf(s.Stdout, "%s/%s created\n", v.kind.Singular, args[0])
		if wait.no {
			return nil
		}
		_, err := s.waitReady(cmd.Context(), v.kind, s.namespace, args[0], wait)
		return err
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	wait.register(cmd)
	return cmd
}

func createVPC(cmd *cobra.Command) func(string) api.Object {
	o := &api.VPC{}
	cmd.Example = "  thaw vpc create shop --cidr 10.0.0.0/16"
	cmd.Flags().StringSliceVar(&o.Spec.CIDRs, "cidr", nil, "range that its subnets lie in; may be repeated (none = any)")
	return func(string) api.Object { return o }
}

func createSubnet(cmd *cobra.Command) func(string) api.Object {
	o := &api.Subnet{}
	cmd.Example = `  thaw subnet create a --vpc shop --cidr 10.0.1.0/24 --bridge br-shop
  thaw subnet create b --vpc shop --cidr 10.0.2.0/24 --device eth1 --vlan 100 --havip 10.0.2.9`
	f := cmd.Flags()
	f.StringVar(&o.Spec.VPC, "vpc", "", "its VPC")
	f.StringVar(&o.Spec.CIDR, "cidr", "", "its addresses, as 10.0.1.0/24")
	f.StringVar(&o.Spec.Gateway, "router", "", "address of the tenant's router to what lies outside (none = nothing outside is reached)")
	f.StringVar(&o.Spec.ENI.Bridge, "bridge", "", "bridge of the gateways' nodes that is in the subnet")
	f.StringVar(&o.Spec.ENI.Device, "device", "", "NIC of the gateways' nodes that is in the subnet, with --vlan or --macvlan")
	f.Int32Var(&o.Spec.ENI.VLAN, "vlan", 0, "VLAN of the subnet on --device, 1 to 4094")
	f.BoolVar(&o.Spec.ENI.Macvlan, "macvlan", false, "the subnet is on --device itself")
	f.StringSliceVar(&o.Spec.HAVIPs, "havip", nil, "address that functions are seen under; may be repeated (none = the highest one)")
	f.Int32Var(&o.Spec.Pairs, "pairs", 0, "how many pairs of gateways there may be under load, each with some of the --havip (0 = one)")
	return func(string) api.Object { return o }
}

func createGateway(cmd *cobra.Command) func(string) api.Object {
	o := &api.Gateway{}
	cmd.Example = "  thaw gateway create a --subnet shop/a"
	cmd.Flags().StringVar(&o.Spec.Subnet, "subnet", "", "its subnet, as VPC/SUBNET")
	cmd.Flags().StringSliceVar(&o.Spec.Nodes, "nodes", nil, "the nodes of its two members (none = the platform chooses)")
	return func(string) api.Object { return o }
}

func createElasticIP(cmd *cobra.Command) func(string) api.Object {
	o := &api.ElasticIP{}
	cmd.Example = "  thaw eip create out --address 203.0.113.7 --subnet shop/a"
	cmd.Flags().StringVar(&o.Spec.Address, "address", "", "the public address")
	cmd.Flags().StringVar(&o.Spec.Subnet, "subnet", "", "what it is bound to, as VPC/SUBNET (none = nothing)")
	cmd.Flags().StringVar(&o.Spec.HAVIP, "havip", "", "the subnet's HAVIP that it is bound to (none = the first)")
	return func(string) api.Object { return o }
}

func netList(env *Env, v netVerb) *cobra.Command {
	s := &session{Env: env}
	var all bool
	cmd := &cobra.Command{Use: "list", Aliases: []string{"ls"}, Short: "List them", Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if err := s.open(); err != nil {
				return err
			}
			if all {
				s.namespace = ""
			}
			return s.list(cmd.Context(), v.kind, client.ListOptions{})
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	s.outputFlag(cmd, true)
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "of all namespaces")
	return cmd
}

func netDelete(env *Env, v netVerb) *cobra.Command {
	s := &session{Env: env}
	var wait waitFlags
	var ignore bool
	cmd := &cobra.Command{Use: "delete NAME...", Aliases: []string{"rm"}, Short: "Delete some that nothing uses", Args: cobra.MinimumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			var docs []document
			for _, name := range args {
				docs = append(docs, document{where: name, kind: v.kind, namespace: s.namespace, name: name})
			}
			if err := s.open(); err != nil {
				return err
			}
			return s.delete(cmd.Context(), docs, wait, ignore)
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	cmd.Flags().BoolVar(&wait.no, "no-wait", false, "return as soon as the server has accepted it")
	cmd.Flags().DurationVar(&wait.timeout, "wait-timeout", 0, "how long to wait until it is gone (0 = as long as it takes)")
	cmd.Flags().BoolVar(&ignore, "ignore-not-found", false, "what is not there is no error")
	return cmd
}

func netDescribe(env *Env, v netVerb) *cobra.Command {
	s := &session{Env: env}
	cmd := &cobra.Command{Use: "describe NAME", Short: "Show one with its state and conditions", Args: exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.open(); err != nil {
				return err
			}
			return s.describeNet(cmd.Context(), v, args[0])
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	s.outputFlag(cmd, false)
	return cmd
}

func (s *session) describeNet(ctx context.Context, v netVerb, name string) error {
	raw, err := s.client.GetRaw(ctx, v.kind, s.namespace, name)
	if errors.Is(err, client.ErrNotFound) {
		return fail(fmt.Errorf("no %s %q in namespace %q: %w", v.kind.Singular, name, s.namespace, client.ErrNotFound), "thaw %s list -n %s", v.word, s.namespace)
	}
	if err != nil {
		return err
	}
	if s.structured() {
		return s.printRaw(raw)
	}
	o, err := s.client.Get(ctx, v.kind, s.namespace, name)
	if err != nil {
		return err
	}
	w := s.Stdout
	for _, f := range append([][2]string{{"Name", o.Meta().Name}, {"Namespace", o.Meta().Namespace}, {"Age", age(o.Meta().CreationTimestamp, s.Now())}}, netFields(o)...) {
		if f[1] != "" {
			fmt.Fprintf(w, "%-12s %s\n", f[0]+":", cell(f[1]))
		}
	}
	if g, ok := o.(*api.Gateway); ok && len(g.Status.Members) > 0 {
		fmt.Fprintln(w, "\nMembers")
		var rows [][]string
		for _, m := range g.Status.Members {
			rows = append(rows, []string{m.Node, m.State, m.Role, m.Message})
		}
		if err := table(w, []string{"NODE", "STATE", "ROLE", "MESSAGE"}, rows); err != nil {
			return err
		}
	}
	fmt.Fprintln(w, "\nConditions")
	var rows [][]string
	for _, c := range api.StatusOf(o).Conditions {
		rows = append(rows, []string{c.Type, c.Status, age(&c.LastTransitionTime, s.Now()), c.Reason, c.Message})
	}
	return table(w, []string{"TYPE", "STATUS", "SINCE", "REASON", "MESSAGE"}, rows)
}

// netFields are the lines about an object, name and value.
func netFields(o api.Object) [][2]string {
	number := func(n int64) string {
		if n == 0 {
			return ""
		}
		return strconv.FormatInt(n, 10)
	}
	switch o := o.(type) {
	case *api.VPC:
		return [][2]string{{"CIDRs", strings.Join(o.Spec.CIDRs, ", ")}, {"Subnets", strings.Join(o.Status.Subnets, ", ")}}
	case *api.Subnet:
		return [][2]string{{"VPC", o.Spec.VPC}, {"CIDR", o.Spec.CIDR}, {"Router", o.Spec.Gateway}, {"ENI", eniText(o.Spec.ENI)}, {"Key", number(o.Status.Key)},
			{"HAVIPs", strings.Join(o.Status.HAVIPs, ", ")}, {"Gateway", o.Status.Gateway}}
	case *api.Gateway:
		var pairs []string
		for _, p := range o.Status.Pairs {
			pairs = append(pairs, fmt.Sprintf("%s (%s)", strings.Join(p.HAVIPs, " "), p.State))
		}
		idle := ""
		if o.Status.IdleSince != nil {
			idle = o.Status.IdleSince.UTC().Format("2006-01-02 15:04:05Z")
		}
		return [][2]string{{"Subnet", o.Spec.Subnet}, {"State", o.Status.State}, {"Address", o.Status.Address}, {"Key", number(o.Status.Key)},
			{"HAVIPs", strings.Join(o.Status.HAVIPs, ", ")}, {"Pairs", strings.Join(pairs, ", ")}, {"Tunnels", o.Status.Driver}, {"MTU", number(o.Status.MTU)}, {"Idle since", idle}}
	case *api.ElasticIP:
		return [][2]string{{"Address", o.Spec.Address}, {"Subnet", o.Spec.Subnet}, {"HAVIP", o.Status.HAVIP}}
	}
	return nil
}

func eniText(e api.ENI) string {
	switch {
	case e.Bridge != "":
		return "bridge " + e.Bridge
	case e.Macvlan:
		return "macvlan on " + e.Device
	}
	return fmt.Sprintf("VLAN %d on %s", e.VLAN, e.Device)
}

// netColumns is columns for the kinds of tenants' networks.
func (s *session) netColumns(k *api.Kind, wide bool) ([]string, func(api.Object) []string) {
	end := []string{"AGE", "READY", "REASON"}
	tail := func(o api.Object) []string {
		ok, reason := ready(api.StatusOf(o).Conditions)
		return []string{age(o.Meta().CreationTimestamp, s.Now()), ok, reason}
	}
	var head []string
	var row func(api.Object) []string
	var more []string
	var extra func(api.Object) []string
	switch k {
	case api.VPCs:
		head = []string{"NAME", "CIDRS", "SUBNETS"}
		row = func(o api.Object) []string {
			v := o.(*api.VPC)
			return []string{v.Name, strings.Join(v.Spec.CIDRs, ","), strings.Join(v.Status.Subnets, ",")}
		}
	case api.Subnets:
		head, more = []string{"NAME", "VPC", "CIDR", "HAVIPS", "GATEWAY"}, []string{"KEY", "ROUTER", "ENI"}
		row = func(o api.Object) []string {
			v := o.(*api.Subnet)
			return []string{v.Name, v.Spec.VPC, v.Spec.CIDR, strings.Join(v.Status.HAVIPs, ","), v.Status.Gateway}
		}
		extra = func(o api.Object) []string {
			v := o.(*api.Subnet)
			return []string{strconv.FormatInt(v.Status.Key, 10), v.Spec.Gateway, eniText(v.Spec.ENI)}
		}
	case api.Gateways:
		head, more = []string{"NAME", "SUBNET", "HAVIPS", "STATE", "MASTER"}, []string{"ADDRESS", "KEY", "TUNNELS", "MTU"}
		row = func(o api.Object) []string {
			v := o.(*api.Gateway)
			return []string{v.Name, v.Spec.Subnet, strings.Join(v.Status.HAVIPs, ","), v.Status.State, v.Master()}
		}
		extra = func(o api.Object) []string {
			v := o.(*api.Gateway)
			return []string{v.Status.Address, strconv.FormatInt(v.Status.Key, 10), v.Status.Driver, strconv.FormatInt(v.Status.MTU, 10)}
		}
	case api.ElasticIPs:
		head = []string{"NAME", "ADDRESS", "SUBNET", "HAVIP"}
		row = func(o api.Object) []string {
			v := o.(*api.ElasticIP)
			return []string{v.Name, v.Spec.Address, v.Spec.Subnet, v.Status.HAVIP}
		}
	default:
		head = []string{"NAME"}
		row = func(o api.Object) []string { return []string{o.Meta().Name} }
	}
	head = append(head, end...)
	if !wide || extra == nil {
		return head, func(o api.Object) []string { return append(row(o), tail(o)...) }
	}
	return append(head, more...), func(o api.Object) []string { return append(append(row(o), tail(o)...), extra(o)...) }
}
