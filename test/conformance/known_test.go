package conformance

import "regexp"

// known lists what does not pass yet, with the reason. A case in this list that passes is a failure of the test: then the line goes.
var known = []struct {
	path, name *regexp.Regexp // of the whole names
	why        string
}{
	{all, regexp.MustCompile(`^client-leaves-(running-(close|reset|post)|quiet-stream|quiet-stream-close)$`), "a client of HTTP/1 that leaves while its request runs and neither side writes is not noticed"},
	{regexp.MustCompile(`\+`), regexp.MustCompile(`^h2-client-leaves-running$`), "the same one hop further: the first hop closes its HTTP/1 connection, the second does not notice"},
}

var all = regexp.MustCompile(``)

func knownFailure(p *path, name string) string {
	for _, k := range known {
		if k.path.MatchString(p.name) && k.name.MatchString(name) {
			return k.why
		}
	}
	return ""
}
