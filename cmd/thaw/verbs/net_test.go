package verbs

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/thawrun/thaw/api"
)

func TestNetVerbs(t *testing.T) {
	s := startServer(t)
	s.run(t, "subnet", "create", "a", "--vpc", "shop", "--cidr", "10.0.1.0/24", "--bridge", "br0").want(t, ExitRefused, "", "there is no such VPC in namespace default: create it first")
	s.run(t, "vpc", "create", "shop", "--cidr", "10.0.0.0/16").want(t, 0, "vpc/shop created\n")
	s.run(t, "subnet", "create", "a", "--vpc", "shop", "--cidr", "10.0.1.0/24", "--bridge", "br0", "--havip", "10.0.1.255").want(t, ExitRefused, "", "it is the broadcast address of 10.0.1.0/24")
	s.run(t, "subnet", "create", "a", "--vpc", "shop", "--cidr", "10.0.1.0/24", "--bridge", "br0").want(t, 0, "subnet/a created\n")
	s.run(t, "subnet", "create", "b", "--vpc", "shop", "--cidr", "10.0.1.0/25", "--bridge", "br0").want(t, ExitRefused, "", "overlaps with 10.0.1.0/24 of subnet a")
	s.run(t, "subnet", "list").want(t, 0, "NAME   VPC    CIDR          HAVIPS       GATEWAY")
	wide := s.run(t, "subnet", "list", "-o", "wide")
	wide.want(t, 0, "bridge br0")
	if !strings.Contains(wide.stdout, "10.0.1.254") {
		t.Errorf("%s", wide.stdout)
	}
	s.run(t, "list", "sn").want(t, 0, "10.0.1.254")
	s.run(t, "eip", "create", "out", "--address", "203.0.113.7", "--subnet", "shop/a").want(t, 0, "elasticip/out created\n")
	s.run(t, "eip", "describe", "out").want(t, 0, "HAVIP:       10.0.1.254")
	s.run(t, "vpc", "describe", "shop").want(t, 0, "Subnets:     a")
	s.run(t, "vpc", "describe", "none").want(t, ExitNotFound, "", `no vpc "none"`)
	s.run(t, "vpc", "delete", "shop").want(t, ExitRefused, "", "in use by subnet a")
	s.run(t, "subnet", "delete", "a").want(t, ExitRefused, "", "in use by elasticip out")
	// This server has no network: the pair says so.
	s.run(t, "gateway", "create", "g", "--subnet", "shop/a").want(t, ExitNotReady, "gateway/g created", "thaw doctor net")
	s.run(t, "gateway", "list").want(t, 0, "NoNetwork")

	r := s.run(t, "subnet", "describe", "a", "-o", "json")
	r.want(t, 0, "")
	var sub api.Subnet
	if err := json.Unmarshal([]byte(r.stdout), &sub); err != nil || sub.Status.Key == 0 {
		t.Errorf("%v %s", err, r.stdout)
	}
	s.run(t, "gateway", "delete", "g").want(t, 0, "gateway/g deleted\n")
	s.run(t, "eip", "delete", "out").want(t, 0, "elasticip/out deleted\n")
	s.run(t, "subnet", "delete", "a", "nothere", "--ignore-not-found").want(t, 0, "subnet/a deleted\n")
	s.run(t, "vpc", "delete", "shop").want(t, 0, "vpc/shop deleted\n")
}
