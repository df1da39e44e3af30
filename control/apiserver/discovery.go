package apiserver

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"

	"github.com/thawrun/thaw/api"
)

// kubernetesVersion is the Kubernetes version whose protocol is spoken; clients compare it with their own.
const kubernetesVersion = "1.32"

type apiResource struct {
	Name         string   `json:"name"`
	SingularName string   `json:"singularName"`
	Namespaced   bool     `json:"namespaced"`
	Kind         string   `json:"kind"`
	Verbs        []string `json:"verbs"`
	ShortNames   []string `json:"shortNames,omitempty"`
	Categories   []string `json:"categories,omitempty"`
}

type apiResourceList struct {
	Kind         string        `json:"kind"`
	APIVersion   string        `json:"apiVersion"`
	GroupVersion string        `json:"groupVersion"`
	Resources    []apiResource `json:"resources"`
}

type groupVersion struct {
	GroupVersion string `json:"groupVersion"`
	Version      string `json:"version"`
}

type apiGroup struct {
	Kind             string         `json:"kind,omitempty"`
	APIVersion       string         `json:"apiVersion,omitempty"`
	Name             string         `json:"name"`
	Versions         []groupVersion `json:"versions"`
	PreferredVersion groupVersion   `json:"preferredVersion"`
}

// document is one of them, ready to be sent.
type document struct {
	contentType string
	body        []byte
	etag        string
}

// documents are the discovery and OpenAPI documents. They never change while the process runs.
type documents struct {
	plain      map[string]document // by path
	aggregated map[string]document // /api and /apis as apidiscovery.k8s.io/v2
	openapiV2  map[string]document // by media type
}

func makeDocuments(thawVersion string) (*documents, error) {
	d := &documents{plain: map[string]document{}, aggregated: map[string]document{}, openapiV2: map[string]document{}}
	put := func(to map[string]document, key, contentType string, v any) error {
		body, err := json.Marshal(v)
		if err != nil {
			return fmt.Errorf("make document %s: %w", key, err)
		}
		to[key] = newDocument(contentType, append(body, '\n'))
		return nil
	}
	var groups []apiGroup
	var aggregated []any
	lists := map[string][]apiResource{}
	for _, k := range api.Kinds {
		g := group(k)
		categories := []string{"all", "knative", "serving"}
		if g == api.NetGroup {
			categories = []string{"net"} // "get all" is about what serves requests
		}
		gv := groupVersion{k.APIVersion, version(k)}
		i := slices.IndexFunc(groups, func(a apiGroup) bool { return a.Name == g })
		if i < 0 {
			groups = append(groups, apiGroup{Name: g, PreferredVersion: gv})
			i = len(groups) - 1
		}
		if !slices.Contains(groups[i].Versions, gv) {
			groups[i].Versions = append(groups[i].Versions, gv)
		}
		lists[k.APIVersion] = append(lists[k.APIVersion],
			apiResource{Name: k.Plural, SingularName: k.Singular, Namespaced: true, Kind: k.Kind, ShortNames: k.ShortNames,
				Categories: categories,
				Verbs:      []string{"create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"}},
			apiResource{Name: k.Plural + "/status", Namespaced: true, Kind: k.Kind, Verbs: []string{"get"}})
	}
	core := []apiResource{
		{Name: "namespaces", SingularName: "namespace", Kind: "Namespace", ShortNames: []string{"ns"}, Verbs: []string{"create", "get", "list", "patch", "update"}},
		{Name: "events", SingularName: "event", Namespaced: true, Kind: "Event", ShortNames: []string{"ev"}, Verbs: []string{"get", "list", "watch"}},
	}
	thawVersion = strings.TrimPrefix(thawVersion, "v")
	type doc struct {
		path string
		v    any
	}
	docs := []doc{
		{"/version", map[string]string{
			"major": "1", "minor": "32", "gitVersion": "v" + kubernetesVersion + ".0+thaw-" + thawVersion, "gitCommit": "", "gitTreeState": "", "buildDate": "",
			"goVersion": runtime.Version(), "compiler": runtime.Compiler, "platform": runtime.GOOS + "/" + runtime.GOARCH}},
		{"/api", map[string]any{"kind": "APIVersions", "versions": []string{"v1"}, "serverAddressByClientCIDRs": []any{}}},
		{"/api/v1", apiResourceList{"APIResourceList", "v1", "v1", core}},
		{"/apis", map[string]any{"kind": "APIGroupList", "apiVersion": "v1", "groups": groups}},
	}
	paths := []string{"/api", "/api/v1", "/apis", "/healthz", "/livez", "/metrics", "/openapi/v2", "/openapi/v3", "/readyz", "/version"}
	for _, g := range groups {
		g.Kind, g.APIVersion = "APIGroup", "v1"
		docs = append(docs, doc{"/apis/" + g.Name, g})
		paths = append(paths, "/apis/"+g.Name)
		var versions []any
		for _, v := range g.Versions {
			docs = append(docs, doc{"/apis/" + v.GroupVersion, apiResourceList{"APIResourceList", "v1", v.GroupVersion, lists[v.GroupVersion]}})
			paths = append(paths, "/apis/"+v.GroupVersion)
			versions = append(versions, aggregatedVersion(g.Name, v.Version, lists[v.GroupVersion]))
		}
		aggregated = append(aggregated, map[string]any{"metadata": map[string]any{"name": g.Name, "creationTimestamp": nil}, "versions": versions})
	}
	slices.Sort(paths)
	docs = append(docs, doc{"/", map[string]any{"paths": paths}})
	for _, v := range docs {
		if err := put(d.plain, v.path, typeJSON, v.v); err != nil {
			return nil, err
		}
	}
	const aggregatedType = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"
	list := func(items []any) any {
		return map[string]any{"kind": "APIGroupDiscoveryList", "apiVersion": "apidiscovery.k8s.io/v2", "metadata": map[string]any{}, "items": items}
	}
	coreGroup := map[string]any{"metadata": map[string]any{"creationTimestamp": nil}, "versions": []any{aggregatedVersion("", "v1", core)}}
	if err := put(d.aggregated, "/api", aggregatedType, list([]any{coreGroup})); err != nil {
		return nil, err
	}
	if err := put(d.aggregated, "/apis", aggregatedType, list(aggregated)); err != nil {
		return nil, err
	}
	return d, d.addOpenAPI(put, thawVersion)
}

// aggregatedVersion is one version of a group as apidiscovery.k8s.io/v2 has it.
func aggregatedVersion(group, version string, list []apiResource) any {
	type kind struct {
		Group   string `json:"group"`
		Version string `json:"version"`
		Kind    string `json:"kind"`
	}
	var resources []map[string]any
	for _, r := range list {
		if name, sub, ok := strings.Cut(r.Name, "/"); ok {
			for _, of := range resources {
				if of["resource"] == name {
					of["subresources"] = []any{map[string]any{"subresource": sub, "responseKind": kind{group, version, r.Kind}, "verbs": r.Verbs}}
				}
			}
			continue
		}
		scope := "Cluster"
		if r.Namespaced {
			scope = "Namespaced"
		}
		m := map[string]any{"resource": r.Name, "responseKind": kind{group, version, r.Kind}, "scope": scope,
			"singularResource": r.SingularName, "verbs": r.Verbs}
		if r.ShortNames != nil {
			m["shortNames"] = r.ShortNames
		}
		if r.Categories != nil {
			m["categories"] = r.Categories
		}
		resources = append(resources, m)
	}
	return map[string]any{"version": version, "resources": resources, "freshness": "Current"}
}

func newDocument(contentType string, body []byte) document {
	sum := sha256.Sum256(body)
	return document{contentType, body, `"` + hex.EncodeToString(sum[:16]) + `"`}
}

// document answers what never changes: discovery, OpenAPI, version.
func (s *Server) document(w http.ResponseWriter, r *http.Request, parts []string) error {
	path := "/" + strings.Join(parts, "/")
	accept := strings.Join(r.Header.Values("Accept"), ",")
	doc, ok := s.documents.plain[path]
	if path == "/openapi/v2" {
		if doc, ok = s.documents.negotiateV2(accept); !ok {
			return notAcceptable(typeJSON, openapiV2Proto)
		}
	} else if !ok {
		return noSuchPath()
	} else {
		f, acceptable := negotiate(accept, true)
		if !acceptable {
			return notAcceptable(typeJSON)
		}
		if a, has := s.documents.aggregated[path]; has && f.aggregated {
			doc = a
		}
	}
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		return methodNotAllowed(w, "GET", "HEAD")
	}
	h := w.Header()
	h.Set("Content-Type", doc.contentType)
	h.Set("ETag", doc.etag)
	h.Set("Vary", "Accept")
	h.Set("Cache-Control", "no-cache, private")
	if hash := r.URL.Query().Get("hash"); hash != "" && `"`+hash+`"` == doc.etag {
		h.Set("Cache-Control", "public, immutable") // this address has this content for ever
	}
	if r.Header.Get("If-None-Match") == doc.etag {
		w.WriteHeader(http.StatusNotModified)
		return nil
	}
	w.Write(doc.body)
	return nil
}

// negotiateV2 picks JSON or protobuf.
func (d *documents) negotiateV2(accept string) (document, bool) {
	if strings.TrimSpace(accept) == "" {
		return d.openapiV2[typeJSON], true
	}
	for clause := range strings.SplitSeq(accept, ",") {
		// Kubernetes' name of the protobuf form has an '@', which package mime refuses.
		mediaType, _, _ := strings.Cut(clause, ";")
		mediaType = strings.ToLower(strings.TrimSpace(mediaType))
		switch mediaType {
		case "*/*", "application/*":
			mediaType = typeJSON
		case openapiV2ProtoSent:
			mediaType = openapiV2Proto
		}
		if doc, ok := d.openapiV2[mediaType]; ok {
			return doc, true
		}
	}
	return document{}, false
}
