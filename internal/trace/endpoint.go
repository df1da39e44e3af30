package trace

import (
	"fmt"
	"net/url"
)

// Scope is the name under which spans are exported.
const Scope = "github.com/thawrun/thaw"

// Endpoint checks the URL of an OTLP/HTTP collector; without a path it gets the usual one, /v1/traces.
func Endpoint(raw string) (string, error) {
	u, err := url.Parse(raw)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.RawQuery != "" || u.Fragment != "" {
		return "", fmt.Errorf("OTLP endpoint %q: want http://HOST:PORT or https://HOST:PORT, with a path if it is not /v1/traces", raw)
	}
	if u.Path == "" || u.Path == "/" {
		u.Path = "/v1/traces"
	}
	return u.String(), nil
}
