package apiserver

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"strings"
	"time"
	"unicode/utf8"

	"sigs.k8s.io/yaml"
)

// Media types that are spoken here.
const (
	typeJSON       = "application/json"
	typeYAML       = "application/yaml"
	typeJSONPatch  = "application/json-patch+json"
	typeMergePatch = "application/merge-patch+json"
	typeApplyPatch = "application/apply-patch+yaml"
)

// bodyTimeout bounds how long a client may take to send a body.
const bodyTimeout = 30 * time.Second

// form is the form of an answer that a client asked for.
type form struct {
	yaml       bool
	table      bool // meta.k8s.io Table
	aggregated bool // apidiscovery.k8s.io APIGroupDiscoveryList
}

// negotiate picks the first form of an Accept header that can be made here. Weights other than 0 are not compared: Kubernetes'
// clients list what they like best first. ok is false when there is none.
func negotiate(header string, discovery bool) (f form, ok bool) {
	if strings.TrimSpace(header) == "" {
		return form{}, true
	}
	for clause := range strings.SplitSeq(header, ",") {
		mediaType, params, err := mime.ParseMediaType(clause)
		if err != nil || params["q"] == "0" {
			continue
		}
		f := form{}
		switch mediaType {
		case typeJSON, "application/*", "*/*":
		case typeYAML:
			f.yaml = true
		default:
			continue
		}
		switch as := params["as"]; {
		case as == "":
		case as == "Table" && params["g"] == "meta.k8s.io" && (params["v"] == "v1" || params["v"] == "v1beta1"):
			f.table = true
		case discovery && as == "APIGroupDiscoveryList" && params["g"] == "apidiscovery.k8s.io" && params["v"] == "v2":
			f.aggregated = true
		default:
			continue
		}
		return f, true
	}
	return form{}, false
}

// accepted is negotiate with the Kubernetes error.
func accepted(r *http.Request) (form, error) {
	f, ok := negotiate(strings.Join(r.Header.Values("Accept"), ","), false)
	if !ok {
		return f, notAcceptable(typeJSON, typeYAML)
	}
	return f, nil
}

func notAcceptable(types ...string) error {
	return fail(http.StatusNotAcceptable, reasonNotAcceptable,
		"only the following media types are accepted: %s", strings.Join(types, ", "))
}

// respond writes a value in the form that was asked for.
func respond(w http.ResponseWriter, r *http.Request, f form, code int, v any) {
	if !f.yaml {
		writeJSON(w, r, code, v)
		return
	}
	data, err := yaml.Marshal(v)
	if err != nil {
		writeError(w, r, fmt.Errorf("write YAML: %w", err))
		return
	}
	w.Header().Set("Content-Type", typeYAML)
	w.WriteHeader(code)
	w.Write(data)
}

// writeJSON writes a value as JSON, indented if the query says pretty=true.
func writeJSON(w http.ResponseWriter, r *http.Request, code int, v any) {
	data, err := json.Marshal(v)
	if err != nil {
		code = http.StatusInternalServerError
		data, _ = json.Marshal(fail(code, reasonInternalError, "write JSON: %v", err).s)
	}
	if isTrue(r.URL.Query().Get("pretty")) {
		var b bytes.Buffer
		if json.Indent(&b, data, "", "  ") == nil {
			data = b.Bytes()
		}
	}
	h := w.Header()
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", typeJSON)
	}
	h.Set("X-Content-Type-Options", "nosniff")
	if h.Get("Cache-Control") == "" {
		h.Set("Cache-Control", "no-cache, private")
	}
	w.WriteHeader(code)
	w.Write(append(data, '\n'))
}

// contentType returns the media type of a request's body, or a 415 that lists what is taken. A body without a type counts as JSON, as
// in Kubernetes, when JSON is taken.
func contentType(r *http.Request, accept ...string) (string, error) {
	header := r.Header.Get("Content-Type")
	if header == "" && accept[0] == typeJSON {
		header = typeJSON
	}
	mediaType, _, err := mime.ParseMediaType(header)
	if err == nil && mediaType == "application/x-yaml" || mediaType == "text/yaml" {
		mediaType = typeYAML
	}
	encoding := r.Header.Get("Content-Encoding")
	if err == nil && (encoding == "" || strings.EqualFold(encoding, "identity")) {
		for _, a := range accept {
			if mediaType == a {
				return a, nil
			}
		}
	}
	if encoding != "" {
		return "", fail(http.StatusUnsupportedMediaType, reasonUnsupportedMedia, "the body of the request is encoded with %q, which is not taken", clip(encoding, 100))
	}
	return "", fail(http.StatusUnsupportedMediaType, reasonUnsupportedMedia,
		"the body of the request was in an unknown format - accepted media types include: %s", strings.Join(accept, ", "))
}

// readBody returns the whole body, or 413 when it is over the limit.
func readBody(w http.ResponseWriter, r *http.Request, limit int64) ([]byte, error) {
	tooLarge := func() error {
		return fail(http.StatusRequestEntityTooLarge, reasonTooLarge, "the body of the request is too large: the limit is %d bytes", limit)
	}
	if r.ContentLength > limit {
		return nil, tooLarge()
	}
	rc := http.NewResponseController(w)
	if rc.SetReadDeadline(time.Now().Add(bodyTimeout)) == nil {
		defer rc.SetReadDeadline(time.Time{})
	}
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, limit))
	var over *http.MaxBytesError
	if errors.As(err, &over) {
		return nil, tooLarge()
	}
	if err != nil {
		return nil, badRequest("the body of the request could not be read: %v", err)
	}
	return data, nil
}

// toJSON turns a body into JSON that is known to be well-formed UTF-8 and to have no key twice in one object: parsers differ in which
// one counts.
func toJSON(data []byte, mediaType string, limit int64) ([]byte, error) {
	if len(bytes.TrimSpace(data)) == 0 {
		return nil, badRequest("the body of the request is empty")
	}
	if !utf8.Valid(data) {
		return nil, badRequest("the body of the request is not valid UTF-8")
	}
	if mediaType == typeYAML || mediaType == typeApplyPatch {
		return yamlToJSON(data, limit)
	}
	if !json.Valid(data) {
		return nil, badRequest("the body of the request is not valid JSON: %v", json.Unmarshal(data, new(any)))
	}
	if found := duplicateKeys(data); len(found) > 0 {
		return nil, badRequest("the body of the request has fields more than once: %s", strings.Join(found, ", "))
	}
	return data, nil
}

func yamlToJSON(data []byte, limit int64) (out []byte, err error) {
	// Parsing YAML has panicked in the past; a bad document must not look like a fault of the server.
	defer func() {
		if p := recover(); p != nil {
			out, err = nil, badRequest("the body of the request is not valid YAML: %v", p)
		}
	}()
	if isManyDocuments(data) {
		return nil, badRequest("the body of the request has several YAML documents; send them one by one")
	}
	out, err = yaml.YAMLToJSONStrict(data)
	if err != nil {
		return nil, badRequest("the body of the request is not valid YAML: %s", clip(oneLine(err.Error()), 300))
	}
	// Aliases make a small document large; the parser bounds the ratio, this the size.
	if int64(len(out)) > limit {
		return nil, fail(http.StatusRequestEntityTooLarge, reasonTooLarge, "the body of the request is too large once its YAML aliases are resolved: the limit is %d bytes", limit)
	}
	return out, nil
}

// isManyDocuments says that after a document separator there is more. The parser would silently drop it.
func isManyDocuments(data []byte) bool {
	content := false
	for line := range bytes.Lines(data) {
		line = bytes.TrimRight(line, " \t\r\n")
		switch {
		case bytes.Equal(line, []byte("---")) || bytes.HasPrefix(line, []byte("--- ")):
			if content {
				return true
			}
			content = len(line) > 4
		case len(line) > 0 && line[0] != '#' && line[0] != '%' && !bytes.Equal(line, []byte("...")):
			content = true
		}
	}
	return false
}

// oneLine joins the lines of the parser's message.
func oneLine(s string) string {
	return strings.Join(strings.Fields(strings.TrimPrefix(s, "yaml: ")), " ")
}

// maxDuplicates bounds how many duplicate keys are named.
const maxDuplicates = 10

// duplicateKeys returns the paths of keys that stand more than once in the same object of well-formed JSON.
func duplicateKeys(data []byte) []string {
	type level struct {
		keys  map[string]bool // nil in an array
		path  string
		key   string
		index int
		value bool // in an object: the next token is a value
	}
	var found []string
	var stack []*level
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	for {
		token, err := d.Token()
		if err != nil {
			return found
		}
		var top *level
		if len(stack) > 0 {
			top = stack[len(stack)-1]
		}
		if delim, ok := token.(json.Delim); ok && (delim == '}' || delim == ']') {
			stack = stack[:len(stack)-1]
			continue
		}
		path := ""
		if top != nil && top.keys != nil && !top.value {
			top.key = token.(string)
			top.value = true
			if top.keys[top.key] && len(found) < maxDuplicates {
				found = append(found, strings.TrimPrefix(top.path+"."+top.key, "."))
			}
			top.keys[top.key] = true
			continue
		}
		if top != nil && top.keys != nil {
			path = top.path + "." + top.key
			top.value = false
		} else if top != nil {
			path = fmt.Sprintf("%s[%d]", top.path, top.index)
			top.index++
		}
		switch token {
		case json.Delim('{'):
			stack = append(stack, &level{keys: map[string]bool{}, path: path})
		case json.Delim('['):
			stack = append(stack, &level{path: path})
		}
	}
}

// isTrue reads a boolean of a query; anything unclear is false.
func isTrue(s string) bool { return s == "true" || s == "1" || s == "True" || s == "TRUE" }
