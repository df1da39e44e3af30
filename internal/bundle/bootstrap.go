package bundle

import (
	"bytes"
	_ "embed"
	"os"
	"path/filepath"
)

// The programs that serve functions which are no servers themselves; docs/functions.md describes what they offer.
var (
	//go:embed bootstrap/python
	pythonBootstrap []byte
	//go:embed bootstrap/node
	nodeBootstrap []byte
)

// settings is the file of a package that tells the node about it; the bootstraps serve on the socket that they are handed,
// and say when the function has been loaded.
const (
	settings      = "thaw.json"
	socketSetting = "{\"socket\": \"fd3\", \"ready\": \"fd4\"}\n"
)

// Language says which of our bootstraps a program is, "" if it is none: "python" or "node", the name of its interpreter being Interpreter.
// One of another version is none.
func Language(program []byte) string {
	for name, own := range bootstraps {
		if bytes.Equal(program, own) {
			return name
		}
	}
	return ""
}

var bootstraps = map[string][]byte{"python": pythonBootstrap, "node": nodeBootstrap}

// Bootstrap returns the program of a language. Started with the one argument --blank it waits on descriptor 5 for a JSON object (env, dir,
// program, args) and becomes that program; where that ends without one, it ends.
func Bootstrap(language string) []byte { return bootstraps[language] }

// Interpreter returns the name of what runs the programs of a language.
func Interpreter(language string) string {
	if language == "python" {
		return "python3"
	}
	return language
}

// bootstrap returns the files that make a package of a folder with a bare function.
func bootstrap(dir string) ([]file, bool) {
	for _, b := range []struct {
		name    string
		program []byte
	}{{"function.py", pythonBootstrap}, {"function.js", nodeBootstrap}} {
		if st, err := os.Stat(filepath.Join(dir, b.name)); err == nil && st.Mode().IsRegular() {
			return []file{{name: Entry, text: b.program, exec: true}, {name: settings, text: []byte(socketSetting)}}, true
		}
	}
	return nil, false
}
