package code

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// manifest lists what was unpacked, so that a folder can be compared with it later. On disk it is one JSON object a line, the summary first.
type manifest struct {
	Bytes    int64    `json:"bytes"` // of all files
	Files    int      `json:"files"` // files, folders and links
	Listed   int      `json:"listed"`
	Runnable bool     `json:"runnable"`
	list     []listed // files and links
}

type listed struct {
	Name string `json:"n"`
	Size int64  `json:"s,omitempty"`
	Hash string `json:"h,omitempty"`
	Exec bool   `json:"x,omitempty"`
	Link string `json:"l,omitempty"`
}

func (m *manifest) write(file string) error {
	m.Listed = len(m.list)
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	w := bufio.NewWriter(f)
	enc := json.NewEncoder(w)
	err = enc.Encode(m)
	for i := range m.list {
		err = errors.Join(err, enc.Encode(&m.list[i]))
	}
	return errors.Join(err, w.Flush(), f.Close())
}

// readManifest reads the summary, and the list too if it is asked for.
func readManifest(file string, list bool) (manifest, error) {
	var m manifest
	f, err := os.Open(file)
	if err != nil {
		return m, err
	}
	defer f.Close()
	dec := json.NewDecoder(bufio.NewReader(f))
	if err := dec.Decode(&m); err != nil {
		return m, fmt.Errorf("%s: %w", file, err)
	}
	for list && len(m.list) < m.Listed {
		var l listed
		if err := dec.Decode(&l); err != nil {
			return m, fmt.Errorf("%s: %w", file, err)
		}
		m.list = append(m.list, l)
	}
	return m, nil
}

// compare says how a folder differs from the list: nil = not at all. Deep, files are read and hashed; else their sizes and modes are enough.
func (m *manifest) compare(ctx context.Context, dir string, deep bool) error {
	want := make(map[string]*listed, len(m.list))
	for i := range m.list {
		want[m.list[i].Name] = &m.list[i]
	}
	err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		name, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		name = filepath.ToSlash(name)
		l := want[name]
		if l == nil && filepath.Base(filepath.Dir(file)) == "__pycache__" && filepath.Ext(name) == ".pyc" {
			return nil // Python leaves it where it may write, and looks at its source before it trusts it
		}
		if l == nil {
			return fmt.Errorf("%s does not belong there", name)
		}
		delete(want, name)
		return l.compare(file, d, deep)
	})
	if err != nil {
		return err
	}
	for name := range want {
		return fmt.Errorf("%s is missing", name)
	}
	return nil
}

func (l *listed) compare(file string, d fs.DirEntry, deep bool) error {
	if l.Link != "" {
		if got, err := os.Readlink(file); err != nil || got != l.Link {
			return fmt.Errorf("link %s has changed", l.Name)
		}
		return nil
	}
	fi, err := d.Info()
	if err != nil {
		return err
	}
	if !fi.Mode().IsRegular() || fi.Size() != l.Size || fi.Mode()&0o100 != 0 != l.Exec {
		return fmt.Errorf("%s has changed", l.Name)
	}
	if !deep {
		return nil
	}
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	h := newHash()
	if _, err := io.Copy(h, f); err != nil {
		return err
	}
	if h.String() != l.Hash {
		return fmt.Errorf("%s has changed", l.Name)
	}
	return nil
}

// sum256 is SHA-256 with its hexadecimal form.
type sum256 struct{ hash.Hash }

func newHash() sum256 { return sum256{sha256.New()} }

func (h sum256) String() string { return hex.EncodeToString(h.Sum(nil)) }
