package verbs

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
)

// maxDocument bounds a file that is read, in bytes; the API takes less.
const maxDocument = 16 << 20

// document is one object of a file that is to be applied or deleted.
type document struct {
	where                         string // file and number, for errors
	kind                          *api.Kind
	namespace, name, generateName string
	data                          []byte // JSON
}

// readDocuments reads all documents of files, folders and "-" (standard input) before anything is done with any of them,
// so that a mistake in the last one leaves nothing half done. namespace is the flag's value and explicit says whether it was
// given: a document of another namespace is then refused.
func (s *session) readDocuments(paths []string, explicit bool) ([]document, error) {
	var docs []document
	for _, path := range paths {
		files, err := expand(path)
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			found, err := s.readFile(file)
			if err != nil {
				return nil, err
			}
			docs = append(docs, found...)
		}
	}
	if len(docs) == 0 {
		return nil, fmt.Errorf("no object in %s", strings.Join(paths, ", "))
	}
	for i := range docs {
		d := &docs[i]
		switch {
		case d.namespace == "":
			d.namespace = s.namespace
		case explicit && d.namespace != s.namespace:
			return nil, usage("%s: the object is of namespace %q, but --namespace says %q", d.where, d.namespace, s.namespace)
		}
	}
	return docs, nil
}

// expand returns the files that a path stands for: itself, or a folder's YAML and JSON files in the order of their names.
func expand(path string) ([]string, error) {
	if path == "-" {
		return []string{path}, nil
	}
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !st.IsDir() {
		return []string{path}, nil
	}
	entries, err := os.ReadDir(path)
	if err != nil {
		return nil, err
	}
	var files []string
	for _, e := range entries {
		switch filepath.Ext(e.Name()) {
		case ".yaml", ".yml", ".json":
			if !e.IsDir() {
				files = append(files, filepath.Join(path, e.Name()))
			}
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("%s has no file that ends in .yaml, .yml or .json", path)
	}
	slices.Sort(files)
	return files, nil
}

func (s *session) readFile(path string) ([]document, error) {
	in, name := s.Stdin, "standard input"
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in, name = f, path
	}
	data, err := io.ReadAll(io.LimitReader(in, maxDocument+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	if len(data) > maxDocument {
		return nil, fmt.Errorf("%s is larger than %d bytes", name, maxDocument)
	}
	return parseDocuments(name, data)
}

// parseDocuments takes a file apart. Empty documents are passed over, lists are opened.
func parseDocuments(name string, data []byte) ([]document, error) {
	var docs []document
	parts := splitYAML(data)
	for i, part := range parts {
		where := name
		if len(parts) > 1 {
			where = fmt.Sprintf("%s, document %d", name, i+1)
		}
		j, err := yaml.YAMLToJSONStrict(part)
		if err != nil {
			return nil, fmt.Errorf("%s is no valid YAML: %s", where, strings.TrimPrefix(err.Error(), "yaml: "))
		}
		if string(bytes.TrimSpace(j)) == "null" {
			continue
		}
		found, err := parseObject(where, j)
		if err != nil {
			return nil, err
		}
		docs = append(docs, found...)
	}
	return docs, nil
}

func parseObject(where string, j []byte) ([]document, error) {
	var head struct {
		APIVersion string `json:"apiVersion"`
		Kind       string `json:"kind"`
		Metadata   struct {
			Name         string `json:"name"`
			GenerateName string `json:"generateName"`
			Namespace    string `json:"namespace"`
		} `json:"metadata"`
		Items []json.RawMessage `json:"items"`
	}
	if err := json.Unmarshal(j, &head); err != nil {
		var te *json.UnmarshalTypeError
		if errors.As(err, &te) && te.Field != "" {
			return nil, fmt.Errorf("%s: %s is a %s, but should be a %s", where, te.Field, te.Value, te.Type.Kind())
		}
		return nil, fmt.Errorf("%s is not an object with apiVersion, kind and metadata", where)
	}
	if head.APIVersion == "v1" && head.Kind == "List" {
		var docs []document
		for i, raw := range head.Items {
			found, err := parseObject(fmt.Sprintf("%s, item %d", where, i+1), raw)
			if err != nil {
				return nil, err
			}
			docs = append(docs, found...)
		}
		return docs, nil
	}
	if head.APIVersion == "" || head.Kind == "" {
		return nil, fmt.Errorf("%s has no apiVersion or no kind", where)
	}
	kind, err := client.KindOf(head.APIVersion, head.Kind)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", where, err)
	}
	if head.Metadata.Name == "" && head.Metadata.GenerateName == "" {
		return nil, fmt.Errorf("%s: missing field(s): metadata.name", where)
	}
	return []document{{
		where: where, kind: kind, data: j,
		namespace: head.Metadata.Namespace, name: head.Metadata.Name, generateName: head.Metadata.GenerateName,
	}}, nil
}

// splitYAML cuts a stream at its document separators: lines that begin with "---". Inside a document nothing can begin so at
// the first column, since block scalars are indented.
func splitYAML(data []byte) [][]byte {
	data = bytes.TrimPrefix(data, []byte("\xef\xbb\xbf"))
	var docs [][]byte
	start := 0
	for pos := 0; pos < len(data); {
		end := len(data)
		if i := bytes.IndexByte(data[pos:], '\n'); i >= 0 {
			end = pos + i + 1
		}
		line := bytes.TrimRight(data[pos:end], "\r\n")
		if rest, ok := bytes.CutPrefix(line, []byte("---")); ok && (len(rest) == 0 || rest[0] == ' ' || rest[0] == '\t') {
			docs = append(docs, data[start:pos])
			start = pos + 3 // what follows on the same line belongs to the new document
		}
		pos = end
	}
	docs = append(docs, data[start:])
	return slices.DeleteFunc(docs, blank)
}

// blank says whether a document holds nothing but white space and comments.
func blank(doc []byte) bool {
	for line := range bytes.Lines(doc) {
		line = bytes.TrimSpace(line)
		if len(line) > 0 && line[0] != '#' {
			return false
		}
	}
	return true
}
