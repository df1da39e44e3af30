package apiserver

import (
	"encoding/json"
	"fmt"
	"net/url"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/thawrun/thaw/api"
)

// recorded is one request that a real client sent.
type recorded struct {
	command string // the command it belongs to
	method  string
	path    string
	header  map[string]string
	body    string
}

// readDialogue reads a file of testdata: "### command", then "METHOD path {headers}" with the body indented below.
func readDialogue(t *testing.T, name string) []recorded {
	t.Helper()
	data, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	var out []recorded
	command := ""
	for i, line := range strings.Split(string(data), "\n") {
		switch {
		case strings.HasPrefix(line, "### "):
			command = line[4:]
		case strings.HasPrefix(line, "    ") && len(out) > 0:
			out[len(out)-1].body += strings.TrimSpace(line)
		case line != "":
			parts := strings.SplitN(line, " ", 3)
			r := recorded{command: command, method: parts[0], path: parts[1], header: map[string]string{}}
			if err := json.Unmarshal([]byte(parts[2]), &r.header); err != nil {
				t.Fatalf("%s line %d: %v", name, i+1, err)
			}
			out = append(out, r)
		}
	}
	return out
}

// repair closes a body that was cut while recording: it was cut inside the status, which comes last and is ignored.
func repair(t *testing.T, body string) string {
	t.Helper()
	if body == "" || json.Valid([]byte(body)) {
		return body
	}
	i := strings.Index(body, `,"status":{`)
	if i < 0 || !json.Valid([]byte(body[:i]+"}")) {
		t.Fatalf("body cannot be repaired: %s", body)
	}
	return body[:i] + "}"
}

var (
	bodyRevision = regexp.MustCompile(`"resourceVersion":"\d+"`)
	bodyUID      = regexp.MustCompile(`"uid":"[0-9a-f-]{36}"`)
	pathRevision = regexp.MustCompile(`resourceVersion=[1-9]\d*`)
)

// current puts the resource version and uid of this run into a recorded request, where the recording has those of its own.
func (r *rig) current(req recorded) recorded {
	if pathRevision.MatchString(req.path) {
		_, rev, err := r.store.List(r.t.Context(), api.Services, "")
		if err != nil {
			r.t.Fatal(err)
		}
		req.path = pathRevision.ReplaceAllString(req.path, fmt.Sprintf("resourceVersion=%d", rev))
	}
	if req.method != "PUT" {
		return req
	}
	kind, name := api.Services, req.path[strings.LastIndexByte(req.path, '/')+1:]
	if strings.Contains(req.path, "domainmappings") {
		kind = api.DomainMappings
	}
	o, err := r.store.Get(r.t.Context(), kind, "default", name)
	if err != nil {
		r.t.Fatal(err)
	}
	req.body = bodyRevision.ReplaceAllString(req.body, `"resourceVersion":"`+o.Meta().ResourceVersion+`"`)
	req.body = bodyUID.ReplaceAllString(req.body, `"uid":"`+o.Meta().UID+`"`)
	return req
}

// TestReplay sends every recorded request of kn and kubectl to the server, with a stand-in for the reconcilers between the
// requests, and compares the answers (code, kind, and what the client looks at) with a file a person can read.
func TestReplay(t *testing.T) {
	for _, name := range []string{"kn", "kubectl"} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			var out strings.Builder
			command := ""
			var open *stream
			all := readDialogue(t, name+".txt")
			for i, req := range all {
				if req.command != command {
					command = req.command
					fmt.Fprintf(&out, "### %s\n", command)
				}
				req.body = repair(t, req.body)
				req = r.current(req)
				var header []string
				for k, v := range req.header {
					header = append(header, k+": "+v)
				}
				fmt.Fprintf(&out, "%s %s\n", req.method, pathRevision.ReplaceAllString(req.path, "resourceVersion=N"))
				if u, _ := url.Parse(req.path); u.Query().Get("watch") == "true" {
					open = r.watch(req.path, header...)
					if i+1 < len(all) && all[i+1].command == command {
						continue // the next request makes the event
					}
					touch(t, r.store, api.Services, "viak", "again")
					fmt.Fprintf(&out, "    watch: %s\n", summaryOfEvent(open.next()))
					open.cancel()
					open = nil
					continue
				}
				a := r.do(req.method, req.path, req.body, header...)
				fmt.Fprintf(&out, "    %s\n", summary(t, a))
				for _, w := range a.header.Values("Warning") {
					fmt.Fprintf(&out, "    Warning: %s\n", w)
				}
				if open != nil {
					fmt.Fprintf(&out, "    watch: %s\n", summaryOfEvent(open.next()))
					open.cancel()
					open = nil
				}
				if req.method != "GET" {
					settle(t, r.store)
				}
			}
			golden(t, "testdata/"+name+".want", out.String())
		})
	}
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(strings.Split(string(want), "\n"), strings.Split(got, "\n")); d != "" {
		t.Errorf("%s differs (-want +got); after a look, run go test -run %s -update:\n%s", file, t.Name(), d)
	}
}

// summary is an answer in one line.
func summary(t *testing.T, a answer) string {
	if a.header.Get("Content-Type") != "application/json" && !strings.HasPrefix(a.header.Get("Content-Type"), "application/json;") {
		return fmt.Sprintf("%d %s", a.code, a.header.Get("Content-Type"))
	}
	return fmt.Sprintf("%d %s", a.code, summaryOf(a.json(t)))
}

func summaryOfEvent(e map[string]any) string {
	o, _ := e["object"].(map[string]any)
	return fmt.Sprintf("%v %s", e["type"], summaryOf(o))
}

func summaryOf(v map[string]any) string {
	kind, _ := v["kind"].(string)
	switch {
	case kind == "Status":
		return strings.TrimSpace(fmt.Sprintf("Status %v %v %v", v["status"], str(v["reason"]), str(v["message"])))
	case kind == "Table":
		var names, rows []string
		for _, c := range v["columnDefinitions"].([]any) {
			names = append(names, strings.ToUpper(str(at(c, "name"))))
		}
		for _, r := range v["rows"].([]any) {
			rows = append(rows, fmt.Sprint(at(r, "cells")))
		}
		return fmt.Sprintf("Table %s: %s", strings.Join(names, ","), strings.Join(rows, "; "))
	case strings.HasSuffix(kind, "List") && v["items"] != nil:
		var names []string
		for _, i := range v["items"].([]any) {
			names = append(names, str(at(i, "metadata", "name")))
		}
		return fmt.Sprintf("%s %v", kind, names)
	case kind == "APIResourceList":
		var names []string
		for _, i := range v["resources"].([]any) {
			names = append(names, str(at(i, "name")))
		}
		return fmt.Sprintf("%s %v", kind, names)
	case at(v, "metadata", "name") != nil:
		s := fmt.Sprintf("%s %s generation %v", kind, at(v, "metadata", "name"), at(v, "metadata", "generation"))
		for _, c := range list(at(v, "status", "conditions")) {
			if at(c, "type") == "Ready" {
				s += " ready " + str(at(c, "status"))
			}
		}
		for _, l := range []string{"latestReadyRevisionName", "url"} {
			if x := at(v, "status", l); x != nil {
				s += " " + str(x)
			}
		}
		for _, tt := range list(at(v, "spec", "traffic")) {
			s += fmt.Sprintf(" [%v%% %v %v]", at(tt, "percent"), str(at(tt, "revisionName")), str(at(tt, "tag")))
		}
		for _, env := range list(at(v, "spec", "template", "spec", "containers", 0, "env")) {
			s += fmt.Sprintf(" %v=%v", at(env, "name"), at(env, "value"))
		}
		if x := at(v, "spec", "template", "spec", "timeoutSeconds"); x != nil {
			s += fmt.Sprintf(" timeout %v", x)
		}
		return s
	}
	if v["gitVersion"] != nil {
		return "version " + str(v["major"]) + "." + str(v["minor"])
	}
	var keys []string
	for _, k := range sortedKeys(v) {
		if k == "paths" {
			k += fmt.Sprint(sortedKeys(v[k].(map[string]any)))
		}
		keys = append(keys, k)
	}
	return strings.TrimSpace(kind + " " + strings.Join(keys, " "))
}

func str(v any) string {
	if v == nil {
		return ""
	}
	return fmt.Sprint(v)
}

func list(v any) []any { l, _ := v.([]any); return l }
