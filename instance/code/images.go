package code

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"
)

// Images maps image references, as they stand in YAML written for a cluster, to local code (exec:// or pkg://). A key
// that ends in * stands for every reference that begins with what is before it; an exact key wins, then the longest prefix.
type Images map[string]string

// maxImagesFile bounds the file of a map of images, in bytes.
const maxImagesFile = 1 << 20

// LoadImages reads a map of images from a YAML file:
//
//	gcr.io/acme/hello: ./bin/hello        # a program, or a folder with an executable "run"; relative to this file
//	gcr.io/acme/tools/*: exec:///opt/tools/run
//	docker.io/acme/app:v2: pkg://sha256:HEX
func LoadImages(file string) (Images, error) {
	fi, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("map of images: %w", err)
	}
	if fi.Size() > maxImagesFile {
		return nil, fmt.Errorf("map of images: %s is larger than %d bytes", file, maxImagesFile)
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("map of images: %w", err)
	}
	dir, err := filepath.Abs(filepath.Dir(file))
	if err != nil {
		return nil, fmt.Errorf("map of images: %w", err)
	}
	m, err := parseImages(b, dir)
	if err != nil {
		return nil, fmt.Errorf("map of images %s: %w", file, err)
	}
	return m, nil
}

func parseImages(b []byte, dir string) (Images, error) {
	var m Images
	if err := yaml.UnmarshalStrict(b, &m); err != nil {
		return nil, err
	}
	for ref, target := range m {
		switch {
		case ref == "" || strings.Contains(strings.TrimSuffix(ref, "*"), "*"):
			return nil, fmt.Errorf("%q: expected an image reference, with * only at its end", ref)
		case target == "":
			return nil, fmt.Errorf("%s: names no code", ref)
		case isLocal(target):
		case strings.Contains(target, "://"):
			return nil, fmt.Errorf("%s: %q is neither exec://, nor pkg://, nor a path", ref, target)
		case filepath.IsAbs(target):
			m[ref] = execScheme + filepath.Clean(target)
		default:
			m[ref] = execScheme + filepath.Join(dir, target)
		}
	}
	return m, nil
}

func isLocal(image string) bool {
	return strings.HasPrefix(image, execScheme) || strings.HasPrefix(image, pkgScheme)
}

// local returns the local form of an image.
func (m Images) local(image string) (string, error) {
	if isLocal(image) {
		return image, nil
	}
	// As written, then without its digest, then without its tag: a map need not follow every release.
	bare := digestSuffix.ReplaceAllString(image, "")
	untagged := bare
	if i := strings.LastIndexByte(bare, ':'); i > strings.LastIndexByte(bare, '/') {
		untagged = bare[:i]
	}
	for _, ref := range []string{image, bare, untagged} {
		if target, ok := m[ref]; ok {
			return target, nil
		}
	}
	best := ""
	for key := range m {
		if prefix, ok := strings.CutSuffix(key, "*"); ok && strings.HasPrefix(image, prefix) && len(key) > len(best) {
			best = key
		}
	}
	if best != "" {
		return m[best], nil
	}
	return "", fmt.Errorf("%w: %q; images are not pulled: deploy a program (exec:///path), a package (thaw deploy --dir), "+
		"or name it in a map of images (thaw dev --images FILE, with a line \"%s: ./path/to/program\")", ErrUnknownImage, image, untagged)
}
