package api

import (
	"fmt"
	"regexp"
	"strings"
)

// The grammars of Kubernetes' names. Each check returns what is wrong in the words of Kubernetes, nothing when the name is
// good.

const (
	maxLabel     = 63  // of a host name
	maxSubdomain = 253 // a whole host name
)

var (
	dns1035Label     = regexp.MustCompile(`^[a-z]([-a-z0-9]*[a-z0-9])?$`)
	dns1123Label     = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?$`)
	dns1123Subdomain = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$`)
	qualifiedName    = regexp.MustCompile(`^([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]$`)
	envName          = regexp.MustCompile(`^[-._a-zA-Z][-._a-zA-Z0-9]*$`)
	headerName       = regexp.MustCompile(`^[-!#$%&'*+.^_` + "`" + `|~0-9A-Za-z]+$`)
)

func tooLong(n int) string { return fmt.Sprintf("must be no more than %d characters", n) }

func checkDNS1035(s string) (wrong []string) {
	if len(s) > maxLabel {
		wrong = append(wrong, tooLong(maxLabel))
	}
	if !dns1035Label.MatchString(s) {
		wrong = append(wrong, "a DNS-1035 label must consist of lower case alphanumeric characters or '-', start with an alphabetic character, and end with an alphanumeric character (e.g. 'my-name',  or 'abc-123', regex used for validation is '[a-z]([-a-z0-9]*[a-z0-9])?')")
	}
	return wrong
}

// checkDNS1035Prefix is for generateName: more will follow, so it may end with a dash.
func checkDNS1035Prefix(s string) []string {
	if strings.HasSuffix(s, "-") {
		s = s[:len(s)-1] + "a"
	}
	return checkDNS1035(s)
}

func checkDNS1123(s string) (wrong []string) {
	if len(s) > maxLabel {
		wrong = append(wrong, tooLong(maxLabel))
	}
	if !dns1123Label.MatchString(s) {
		wrong = append(wrong, "a lowercase RFC 1123 label must consist of lower case alphanumeric characters or '-', and must start and end with an alphanumeric character (e.g. 'my-name',  or '123-abc', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?')")
	}
	return wrong
}

func checkSubdomain(s string) (wrong []string) {
	if len(s) > maxSubdomain {
		wrong = append(wrong, tooLong(maxSubdomain))
	}
	if !dns1123Subdomain.MatchString(s) {
		wrong = append(wrong, "a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end with an alphanumeric character (e.g. 'example.com', regex used for validation is '[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')")
	}
	return wrong
}

// checkHost is for domain mappings: a host name of at least two labels.
func checkHost(s string) []string {
	if wrong := checkSubdomain(s); wrong != nil {
		return wrong
	}
	labels := strings.Split(s, ".")
	if len(labels) < 2 {
		return []string{"should be a domain with at least two segments separated by dots"}
	}
	for _, l := range labels {
		if len(l) > maxLabel {
			return []string{fmt.Sprintf("each segment of the domain %s", tooLong(maxLabel))}
		}
	}
	return nil
}

// checkKey is for the keys of labels and annotations: a name, with the subdomain of its owner and a slash before it or not.
func checkKey(s string) (wrong []string) {
	prefix, name, ok := strings.Cut(s, "/")
	if !ok {
		prefix, name = "", s
	} else if prefix == "" {
		wrong = append(wrong, "prefix part must be non-empty")
	} else {
		for _, w := range checkSubdomain(prefix) {
			wrong = append(wrong, "prefix part "+w)
		}
	}
	if name == "" {
		return append(wrong, "name part must be non-empty")
	}
	if len(name) > maxLabel {
		wrong = append(wrong, "name part "+tooLong(maxLabel))
	}
	if !qualifiedName.MatchString(name) {
		wrong = append(wrong, "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')")
	}
	return wrong
}

func checkLabelValue(s string) (wrong []string) {
	if len(s) > maxLabel {
		wrong = append(wrong, tooLong(maxLabel))
	}
	if s != "" && !qualifiedName.MatchString(s) {
		wrong = append(wrong, "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is '(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')")
	}
	return wrong
}

func checkEnvName(s string) []string {
	if !envName.MatchString(s) {
		return []string{"a valid environment variable name must consist of alphabetic characters, digits, '_', '-', or '.', and must not start with a digit (e.g. 'my.env-name',  or 'MY_ENV.NAME',  or 'MyEnvName1', regex used for validation is '[-._a-zA-Z][-._a-zA-Z0-9]*')"}
	}
	return nil
}

var (
	sha256Hex   = regexp.MustCompile(`^[0-9a-f]{64}$`)
	imageDomain = regexp.MustCompile(`^(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9]([-A-Za-z0-9.]*[A-Za-z0-9])?)(:[0-9]+)?$`)
	imagePath   = regexp.MustCompile(`^[a-z0-9]([-a-z0-9_.]*[a-z0-9])?(/[a-z0-9]([-a-z0-9_.]*[a-z0-9])?)*$`)
	imageTag    = regexp.MustCompile(`^[A-Za-z0-9_][-A-Za-z0-9_.]{0,127}$`)
)

// Schemes of code references that are no OCI reference.
const (
	SchemeExec    = "exec://" // a program of this machine: exec:///abs/path, or exec:///abs/path@sha256:<hex> once resolved
	SchemePackage = "pkg://"  // an uploaded package: pkg://sha256:<hex>
)

// checkImage says what is wrong with a code reference.
func checkImage(s string) string {
	if len(s) > 4096 {
		return tooLong(4096)
	}
	if strings.ContainsFunc(s, func(r rune) bool { return r < ' ' || r == 0x7f }) {
		return "must not contain control characters"
	}
	if path, ok := strings.CutPrefix(s, SchemeExec); ok {
		if !strings.HasPrefix(path, "/") || strings.TrimLeft(path, "/") == "" {
			return "exec:// is followed by the absolute path of a program, so that there are three slashes"
		}
		return ""
	}
	if digest, ok := strings.CutPrefix(s, SchemePackage); ok {
		if hex, ok := strings.CutPrefix(digest, "sha256:"); !ok || !sha256Hex.MatchString(hex) {
			return "pkg:// is followed by sha256: and 64 lower case hexadecimal digits"
		}
		return ""
	}
	if scheme, _, ok := strings.Cut(s, "://"); ok {
		return fmt.Sprintf("unknown scheme %q: expected exec://, pkg:// or an image reference without a scheme", scheme)
	}
	return checkOCI(s)
}

// checkOCI checks [domain/]path[:tag][@sha256:hex].
func checkOCI(s string) string {
	name, digest, ok := strings.Cut(s, "@")
	if ok {
		if hex, ok := strings.CutPrefix(digest, "sha256:"); !ok || !sha256Hex.MatchString(hex) {
			return "a digest is sha256: and 64 lower case hexadecimal digits"
		}
	}
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		if !imageTag.MatchString(name[i+1:]) {
			return "a tag has 1 to 128 letters, digits, '_', '-' or '.' and begins with none of the last two"
		}
		name = name[:i]
	}
	domain, path, ok := strings.Cut(name, "/")
	if !ok || !strings.ContainsAny(domain, ".:") && domain != "localhost" {
		domain, path = "", name // docker.io, by convention
	}
	if domain != "" && !imageDomain.MatchString(domain) {
		return fmt.Sprintf("%q is no host name", domain)
	}
	if len(path) > 255 || !imagePath.MatchString(path) {
		return "a repository name has up to 255 lower case letters, digits, '-', '_' and '.', in parts joined by '/'"
	}
	return ""
}
