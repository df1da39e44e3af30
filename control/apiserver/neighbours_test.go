package apiserver

import (
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
)

const netPath = "/apis/net.thaw.run/v1alpha1/namespaces/default/"

func netObject(kind, name, spec string) string {
	return fmt.Sprintf(`{"apiVersion":"net.thaw.run/v1alpha1","kind":%q,"metadata":{"name":%q},"spec":{%s}}`, kind, name, spec)
}

func vpc(name string) string { return netObject("VPC", name, "") }

func subnet(vpc, name, cidr string) string {
	return netObject("Subnet", name, fmt.Sprintf(`"vpc":%q,"cidr":%q,"eni":{"bridge":"br0"}`, vpc, cidr))
}

// The life of a network's objects through the API, with what is refused on the way.
func TestNetObjects(t *testing.T) {
	r := newRig(t)
	refused := func(code int, reason, method, path, body, says string, header ...string) {
		t.Helper()
		if s := r.refused(code, reason, method, path, body, header...); !strings.Contains(s.Message, says) {
			t.Errorf("%s %s: %s; want %q", method, path, s.Message, says)
		}
	}
	invalid := "Invalid"
	refused(422, invalid, "POST", netPath+"subnets", subnet("v", "s", "10.0.1.0/24"), "there is no such VPC in namespace default: create it first")
	r.must(201, "POST", netPath+"vpcs", vpc("v"))
	r.must(201, "POST", netPath+"subnets?dryRun=All", subnet("v", "s", "10.0.1.0/24"))
	r.must(201, "POST", netPath+"subnets", subnet("v", "s", "10.0.1.0/24"))
	refused(422, invalid, "POST", netPath+"subnets", subnet("v", "t", "10.0.1.128/25"), "overlaps with 10.0.1.0/24 of subnet s")
	refused(422, invalid, "POST", netPath+"subnets?dryRun=All", subnet("v", "t", "10.0.1.128/25"), "overlaps with 10.0.1.0/24 of subnet s")
	refused(422, invalid, "PATCH", netPath+"subnets/t?fieldManager=x", subnet("v", "t", "10.0.0.0/8"), "overlaps", "Content-Type: application/apply-patch+yaml")
	refused(422, invalid, "PATCH", netPath+"subnets/s", `{"spec":{"cidr":"10.0.2.0/24"}}`, "Immutable fields changed", "Content-Type: application/merge-patch+json")
	refused(422, invalid, "PATCH", netPath+"vpcs/v", `{"spec":{"cidrs":["10.9.0.0/16"]}}`, "subnet s has 10.0.1.0/24, which would lie outside", "Content-Type: application/merge-patch+json")
	r.must(200, "PATCH", netPath+"vpcs/v", `{"spec":{"cidrs":["10.0.0.0/16"]}}`, "Content-Type: application/merge-patch+json")
	refused(409, "Conflict", "DELETE", netPath+"vpcs/v", "", `vpcs.net.thaw.run "v": it is in use by subnet s`)
	refused(409, "Conflict", "DELETE", netPath+"vpcs", "", "in use by subnet s")

	// An address is of the whole installation.
	eip := netObject("ElasticIP", "e", `"address":"203.0.113.7"`)
	r.must(201, "POST", netPath+"elasticips", eip)
	refused(422, invalid, "POST", strings.Replace(netPath, "default", "other", 1)+"elasticips", eip, "elastic IP e of namespace default has it")

	// A revision uses its subnet.
	rev := &api.Revision{ObjectMeta: api.ObjectMeta{Namespace: "default", Name: "f-00001", Annotations: map[string]string{api.AnnotationSubnet: "v/s"}}}
	rev.Spec.Containers = []api.Container{{Image: "dev.local/x"}}
	if _, err := r.store.Create(t.Context(), api.Revisions, rev); err != nil {
		t.Fatal(err)
	}
	refused(409, "Conflict", "DELETE", netPath+"subnets/s", "", "in use by revision f-00001")
	r.must(200, "DELETE", "/apis/serving.knative.dev/v1/namespaces/default/revisions/f-00001", "")
	r.must(200, "DELETE", netPath+"subnets/s", "")
	r.must(200, "DELETE", netPath+"vpcs/v", "")
	refused(404, "NotFound", "DELETE", netPath+"vpcs/v", "", "not found")
}

// Of subnets that overlap and come at the same time, one is stored.
func TestOverlapAtOnce(t *testing.T) {
	r := newRig(t)
	r.must(201, "POST", netPath+"vpcs", vpc("v"))
	r.state.late = 20 * time.Millisecond // others have looked around meanwhile
	var wg sync.WaitGroup
	codes := make([]int, 20)
	for i := range codes {
		wg.Go(func() {
			codes[i] = r.do("POST", netPath+"subnets", subnet("v", fmt.Sprintf("s%d", i), "10.0.1.0/24")).code
		})
	}
	wg.Wait()
	count := map[int]int{}
	for _, c := range codes {
		count[c]++
	}
	if count[201] != 1 || count[422] != len(codes)-1 {
		t.Errorf("%v", count)
	}
}

func TestNetTables(t *testing.T) {
	r := newRig(t)
	r.must(201, "POST", netPath+"vpcs", vpc("v"))
	r.must(201, "POST", netPath+"subnets", subnet("v", "s", "10.0.1.0/24"))
	r.must(201, "POST", netPath+"gateways", netObject("Gateway", "g", `"subnet":"v/s"`))
	r.must(201, "POST", netPath+"elasticips", netObject("ElasticIP", "e", `"address":"203.0.113.7"`))
	o, err := r.store.Get(t.Context(), api.Gateways, "default", "g")
	if err != nil {
		t.Fatal(err)
	}
	st := &o.(*api.Gateway).Status
	st.HAVIPs, st.State = []string{"10.0.1.254"}, api.PairActive
	st.Members = []api.GatewayMember{{Node: "a", Role: api.RoleBackup}, {Node: "b", Role: api.RoleMaster}}
	st.Conditions.Set(r.server.now(), api.ConditionReady, api.True, "", "")
	if _, err := r.store.UpdateStatus(t.Context(), api.Gateways, o); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ plural, want string }{
		{"vpcs", "Name:v CIDRs:<nil> Subnets:<nil> Ready:<nil> Reason:<nil>"},
		{"subnets", "Name:s VPC:v Key:0 CIDR:10.0.1.0/24 HAVIPs:<nil> Gateway:<nil> Ready:<nil> Reason:<nil>"},
		{"gateways", "Name:g Subnet:v/s HAVIPs:10.0.1.254 State:active Master:b Ready:True Reason:<nil>"},
		{"elasticips", "Name:e Address:203.0.113.7 Subnet:<nil> HAVIP:<nil> Ready:<nil> Reason:<nil>"},
	} {
		v := r.must(200, "GET", netPath+c.plural, "", "Accept: application/json;as=Table;v=v1;g=meta.k8s.io")
		var cells []string
		for i, col := range list(v["columnDefinitions"]) {
			cells = append(cells, fmt.Sprintf("%v:%v", at(col, "name"), at(v, "rows", 0, "cells", i)))
		}
		if got := strings.Join(cells, " "); got != c.want {
			t.Errorf("%s\ngot  %s\nwant %s", c.plural, got, c.want)
		}
	}
}
