package knative

import (
	"errors"
	"strings"
	"testing"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/test/harness"
)

// configuration is a Configuration of its own, without a service.
func configuration(name string) *api.Configuration {
	c := &api.Configuration{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: name}}
	c.Spec.Template.Spec.Containers = []api.Container{{Image: program("function")}}
	return c
}

func route(name, configuration string) *api.Route {
	r := &api.Route{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: name}}
	r.Spec.Traffic = []api.TrafficTarget{{ConfigurationName: configuration, Percent: ptr(int64(100))}}
	return r
}

// get and list agree, a label selects, and what was listed has its kind's spec and status.
func listed(t *testing.T, th *harness.Thaw, k *api.Kind, name, selector string, want int) {
	t.Helper()
	list, version, err := th.Client.List(t.Context(), k, ns, client.ListOptions{LabelSelector: selector})
	if err != nil || version == "" {
		t.Fatalf("list of %s: %v, version %q", k.Plural, err, version)
	}
	if len(list) != want || !contains(list, name) {
		t.Errorf("%d %s with %s, want %d with %s", len(list), k.Plural, selector, want, name)
	}
	for _, o := range list {
		one, err := th.Client.Get(t.Context(), k, ns, o.Meta().Name)
		if err != nil || !api.EqualSpec(one, o) || one.Meta().UID != o.Meta().UID {
			t.Errorf("%s %s: list and get differ (%v)", k.Singular, o.Meta().Name, err)
		}
	}
	all, _, err := th.Client.List(t.Context(), k, "", client.ListOptions{LabelSelector: selector})
	if err != nil || len(all) != want {
		t.Errorf("in all namespaces: %d, %v", len(all), err)
	}
	none, _, err := th.Client.List(t.Context(), k, "elsewhere", client.ListOptions{LabelSelector: selector})
	if err != nil || len(none) != 0 {
		t.Errorf("in another namespace: %d, %v", len(none), err)
	}
}

// test/conformance/api/v1/configuration_test.go
func TestConfigurationGetAndList(t *testing.T) {
	th := shared(t)
	create(t, th, service("cfglist"))
	c := get[*api.Configuration](t, th, "cfglist")
	if c.Kind != "Configuration" || c.APIVersion != api.ServingV1 || c.Status.LatestReadyRevisionName != "cfglist-00001" || c.Status.ObservedGeneration != c.Generation {
		t.Errorf("%+v", c)
	}
	listed(t, th, api.Configurations, "cfglist", "serving.knative.dev/service=cfglist", 1)
}

// test/conformance/api/v1/revision_test.go
func TestRevisionGetAndList(t *testing.T) {
	th := shared(t)
	create(t, th, service("revlist"))
	update(t, th, "revlist", env("V", "2"))
	r := get[*api.Revision](t, th, "revlist-00001")
	if r.Kind != "Revision" || !r.Ready() || len(r.OwnerReferences) != 1 || r.OwnerReferences[0].Kind != "Configuration" || r.Spec.Containers[0].Name != "user-container" {
		t.Errorf("%+v", r)
	}
	listed(t, th, api.Revisions, "revlist-00001", "serving.knative.dev/service=revlist", 2)
	listed(t, th, api.Revisions, "revlist-00002", "serving.knative.dev/configuration=revlist,serving.knative.dev/configurationGeneration in (2)", 1)
	// A stored revision never changes.
	if _, err := th.Client.Patch(t.Context(), api.Revisions, ns, "revlist-00001", client.MergePatch, []byte(`{"spec":{"timeoutSeconds":17}}`)); !errors.Is(err, client.ErrInvalid) || !strings.Contains(err.Error(), "Immutable fields changed") {
		t.Errorf("changing a revision: %v", err)
	}
}

// test/conformance/api/v1/route_test.go
func TestRouteGetAndList(t *testing.T) {
	th := shared(t)
	create(t, th, service("rtlist"))
	r := get[*api.Route](t, th, "rtlist")
	if r.Kind != "Route" || r.Status.URL != "http://rtlist.default.localhost:"+port(th) {
		t.Errorf("%+v", r)
	}
	wantTraffic(t, r.Status.Traffic, "latest:rtlist-00001=100")
	listed(t, th, api.Routes, "rtlist", "serving.knative.dev/service=rtlist", 1)
}

// TestRouteCreation: a configuration and a route without a service; the route follows the configuration's latest ready revision.
func TestRouteCreation(t *testing.T) {
	th := shared(t)
	c := post(t, th, configuration("alone"))
	post(t, th, route("way", "alone"))
	ready[*api.Configuration](t, th, "alone")
	rt := ready[*api.Route](t, th, "way")
	wantTraffic(t, rt.Status.Traffic, "latest:alone-00001=100")
	got := see(t, th, "way")
	if got.Env["K_REVISION"] != "alone-00001" || got.Env["K_CONFIGURATION"] != "alone" {
		t.Errorf("%v", got.Env)
	}
	if _, ok := get[*api.Revision](t, th, "alone-00001").Labels[api.LabelService]; ok {
		t.Error("the revision says that it belongs to a service")
	}
	replace(t, th, c.Name, func(c *api.Configuration) {
		c.Spec.Template.Spec.Containers[0].Env = []api.EnvVar{{Name: "V", Value: "2"}}
	})
	harness.Eventually(t, patient, "the route follows", func() bool { return see(t, th, "way").Env["K_REVISION"] == "alone-00002" })
	if err := th.Client.Delete(t.Context(), api.Routes, ns, "way"); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, patient, "the host is gone", func() bool { return th.Get("way", "/").Status == 404 })
	if err := th.Client.Delete(t.Context(), api.Configurations, ns, "alone"); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, patient, "the revisions are gone", func() bool {
		list, _, err := th.Client.List(t.Context(), api.Revisions, ns, client.ListOptions{LabelSelector: "serving.knative.dev/configuration=alone"})
		return err == nil && len(list) == 0
	})
}

// test/conformance/api/v1/generatename_test.go
func TestRouteAndConfigGenerateName(t *testing.T) {
	th := shared(t)
	c := configuration("")
	c.GenerateName = "generate-cfg-"
	c = post(t, th, c)
	r := route("", c.Name)
	r.GenerateName = "generate-rt-"
	r = create(t, th, r)
	if !strings.HasPrefix(c.Name, "generate-cfg-") || !strings.HasPrefix(r.Name, "generate-rt-") {
		t.Errorf("names %q, %q", c.Name, r.Name)
	}
	if got := see(t, th, r.Name); got.Env["K_CONFIGURATION"] != c.Name {
		t.Errorf("%v", got.Env)
	}
}

// TestUpdateConfigurationMetadata: labels and annotations of a configuration can be changed, and make no revision; those of its
// template do, and are the revision's.
func TestUpdateConfigurationMetadata(t *testing.T) {
	th := shared(t)
	create(t, th, configuration("meta"))
	replace(t, th, "meta", func(c *api.Configuration) {
		c.Labels = map[string]string{"labelX": "abc", "labelY": "def"}
		c.Annotations["annotationA"] = "123"
	})
	c := ready[*api.Configuration](t, th, "meta")
	if c.Labels["labelX"] != "abc" || c.Annotations["annotationA"] != "123" || c.Generation != 1 || c.Status.LatestCreatedRevisionName != "meta-00001" {
		t.Errorf("%+v", c)
	}
	if r := get[*api.Revision](t, th, "meta-00001"); r.Labels["labelX"] != "" || r.Annotations["annotationA"] != "" {
		t.Errorf("the revision has the configuration's own metadata: %v %v", r.Labels, r.Annotations)
	}
	replace(t, th, "meta", func(c *api.Configuration) {
		c.Spec.Template.Labels = map[string]string{"labelZ": "ghi"}
		c.Spec.Template.Annotations = map[string]string{"annotationB": "456"}
	})
	ready[*api.Configuration](t, th, "meta")
	if r := get[*api.Revision](t, th, "meta-00002"); r.Labels["labelZ"] != "ghi" || r.Annotations["annotationB"] != "456" {
		t.Errorf("labels %v, annotations %v", r.Labels, r.Annotations)
	}
}

// TestUpdateRevisionLabels: people may label revisions; the platform's own labels stay, and nothing takes theirs away.
func TestUpdateRevisionLabels(t *testing.T) {
	th := shared(t)
	create(t, th, service("labels"))
	patch[*api.Revision](t, th, "labels-00001", client.MergePatch, `{"metadata":{"labels":{"mine":"yes"},"annotations":{"mine":"too"}}}`)
	update(t, th, "labels", env("V", "2")) // makes the platform write its own labels: active becomes reserve
	harness.Eventually(t, patient, "the old revision is in reserve", func() bool {
		return get[*api.Revision](t, th, "labels-00001").Labels[api.LabelRoutingState] == "reserve"
	})
	r := get[*api.Revision](t, th, "labels-00001")
	if r.Labels["mine"] != "yes" || r.Annotations["mine"] != "too" || r.Labels[api.LabelService] != "labels" || r.Generation != 1 {
		t.Errorf("labels %v, annotations %v, generation %d", r.Labels, r.Annotations, r.Generation)
	}
	listed(t, th, api.Revisions, "labels-00001", "mine=yes", 1)
}

// TestDomainMapping is test/conformance/api/v1beta1/domain_mapping_test.go and more: create, call, list, retarget, delete; a host
// can be claimed once; a mapping of nothing says so and heals.
func TestDomainMapping(t *testing.T) {
	th := shared(t)
	const host = "www.example.com"
	mapping := &api.DomainMapping{ObjectMeta: api.ObjectMeta{Namespace: ns, Name: host}}
	mapping.Spec.Ref = api.Reference{Kind: "Service", Name: "mapped", APIVersion: api.ServingV1}
	post(t, th, mapping)
	if c := condition[*api.DomainMapping](t, th, host, "ReferenceResolved", "False"); c.Reason != "ResolveFailed" {
		t.Errorf("mapping of nothing: %+v", c)
	}
	if a := th.Get(host, "/"); a.Status != 404 {
		t.Errorf("mapping of nothing: %v", a)
	}
	create(t, th, service("mapped"))
	dm := ready[*api.DomainMapping](t, th, host)
	if dm.Status.URL != "http://"+host+":"+port(th) {
		t.Errorf("url %q", dm.Status.URL)
	}
	if got := see(t, th, host, "K-Original-Host", "forged.example.com"); got.Env["K_SERVICE"] != "mapped" || got.Host != host {
		t.Errorf("service %q, host %q", got.Env["K_SERVICE"], got.Host)
	}
	listed(t, th, api.DomainMappings, host, "", 1)

	other := api.DeepCopy(mapping)
	other.Namespace = "other"
	if _, err := th.Client.Create(t.Context(), api.DomainMappings, other); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, patient, "the second claim is refused", func() bool {
		o, err := th.Client.Get(t.Context(), api.DomainMappings, "other", host)
		if err != nil {
			return false
		}
		c := api.StatusOf(o).Conditions.Get("DomainClaimed")
		return c != nil && c.Status == "False" && c.Reason == "DomainAlreadyClaimed"
	})
	if err := th.Client.Delete(t.Context(), api.DomainMappings, "other", host); err != nil {
		t.Fatal(err)
	}

	create(t, th, service("mapped2"))
	replace(t, th, host, func(d *api.DomainMapping) { d.Spec.Ref.Name = "mapped2" })
	harness.Eventually(t, patient, "the mapping leads to the other service", func() bool { return see(t, th, host).Env["K_SERVICE"] == "mapped2" })
	if err := th.Client.Delete(t.Context(), api.DomainMappings, ns, host); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, patient, "the host is gone", func() bool { return th.Get(host, "/").Status == 404 })
	if a := th.Get("mapped2", "/"); a.Status != 200 {
		t.Errorf("the service itself: %v", a)
	}
}

// TestVisibility: a cluster-local service has private hosts only. A public one has both.
func TestVisibility(t *testing.T) {
	th := shared(t)
	local := func(s *api.Service) { s.Labels = map[string]string{api.LabelVisibility: api.VisibilityClusterLocal} }
	s := create(t, th, service("private", local))
	if s.Status.URL != "http://private.default.svc.cluster.local" {
		t.Errorf("url %q", s.Status.URL)
	}
	for host, want := range map[string]int{
		"private.default.localhost": 404, "private.default.svc.cluster.local": 200, "private.default.svc": 200, "private.default": 200,
	} {
		if a := th.Get(host, "/"); a.Status != want {
			t.Errorf("%s: %v, want %d", host, a, want)
		}
	}
	update(t, th, "private", func(s *api.Service) { delete(s.Labels, api.LabelVisibility) })
	for _, host := range []string{"private.default.localhost", "private.default.svc.cluster.local"} {
		harness.Eventually(t, patient, host+" answers", func() bool { return th.Get(host, "/").Status == 200 })
	}
	// A label is no change of the spec, so Ready does not tell when it has been taken up.
	harness.Eventually(t, patient, "the status has the public URL", func() bool {
		return get[*api.Service](t, th, "private").Status.URL == "http://private.default.localhost:"+port(th)
	})
}
