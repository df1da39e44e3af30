package conformance

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/thawrun/thaw/test/harness"
	"github.com/thawrun/thaw/test/protocols"
)

// TestFromZero runs every case against `thaw dev`, each twice: first for a service of its own that has no instance, then for the instance that
// the first one has started. The function of the last kind listens only 2 s after its start.
func TestFromZero(t *testing.T) {
	t.Parallel()
	th := harness.Start(t, bin)
	late := []protocols.Case{}
	for _, c := range protocols.HTTPCases {
		if c.Name == "echo" || c.Name == "websocket" {
			late = append(late, c)
		}
	}
	for _, k := range []struct {
		kind, port, protocol, listenMS string
		http2                          bool
		cases                          []protocols.Case
	}{
		{"h1", "http1", "http", "0", false, protocols.HTTPCases},
		{"h1-by-h2", "http1", "http", "0", true, protocols.HTTPCases},
		{"h2c-by-h2", "h2c", "http", "0", true, protocols.HTTPCases},
		{"grpc", "h2c", "grpc", "0", true, protocols.GRPCCases},
		{"late", "http1", "http", "2000", false, late},
	} {
		for _, c := range k.cases {
			if c.H1 && k.http2 {
				continue
			}
			t.Run(k.kind+"/"+c.Name, func(t *testing.T) {
				t.Parallel()
				name := strings.ToLower(k.kind + "-" + c.Name)
				th := th.For(t)
				th.Apply(fmt.Sprintf(`apiVersion: serving.knative.dev/v1
kind: Service
metadata: {name: %s}
spec:
  template:
    metadata: {annotations: {autoscaling.knative.dev/initial-scale: "0", autoscaling.knative.dev/max-scale: "1"}}
    spec:
      containers:
      - image: exec://$BIN/function
        ports: [{name: %s}]
        env: [{name: PROTOCOL, value: %s}, {name: LISTEN_MS, value: %q}]
`, name, k.port, k.protocol, k.listenMS))
				for _, state := range []string{"cold", "warm"} {
					combinations.Add(1)
					ctx, cancel := context.WithTimeout(t.Context(), 2*limit)
					if err := c.Run(ctx, protocols.Target{Addr: th.Ingress, Host: name + ".default.localhost", HTTP2: k.http2}); err != nil {
						t.Errorf("%s: %v", state, err)
					}
					cancel()
				}
			})
		}
	}
}
