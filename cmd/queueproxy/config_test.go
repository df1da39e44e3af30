package main

import (
	"flag"
	"io"
	"strings"
	"testing"
	"time"
)

func environment(kv ...string) func(string) (string, bool) {
	m := map[string]string{}
	for i := 0; i < len(kv); i += 2 {
		m[kv[i]] = kv[i+1]
	}
	return func(k string) (string, bool) { v, ok := m[k]; return v, ok }
}

// Knative's names with values as its controller writes them.
func TestConfigureFromKnative(t *testing.T) {
	c, err := configure(nil, environment(
		"CONTAINER_CONCURRENCY", "10", "QUEUE_SERVING_PORT", "8012", "QUEUE_SERVING_TLS_PORT", "8112", "USER_PORT", "9000",
		"REVISION_TIMEOUT_SECONDS", "60", "REVISION_RESPONSE_START_TIMEOUT_SECONDS", "30", "REVISION_IDLE_TIMEOUT_SECONDS", "5",
		"SERVING_READINESS_PROBE", `{"httpGet":{"path":"/healthz","port":9000,"host":"127.0.0.1","scheme":"HTTP"},"successThreshold":2}`,
		"SERVING_NAMESPACE", "default", "SERVING_REVISION", "hello-00001", "SERVING_POD", "hello-00001-deployment-x", "SERVING_SERVICE", "hello",
		"ENABLE_HTTP2_AUTO_DETECTION", "false",
	), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if c.listen != ":8012" || c.admin != ":8022" || c.stats != ":9090" || c.metrics != ":9091" || c.upstream != "127.0.0.1:9000" {
		t.Errorf("addresses %+v", c)
	}
	if c.concurrency != 10 || c.total != time.Minute || c.responseStart != 30*time.Second || c.idle != 5*time.Second || c.maxWait != time.Minute || c.queue != 0 {
		t.Errorf("limits %+v", c)
	}
	if c.probe.HTTPGet == nil || c.probe.HTTPGet.Path != "/healthz" || c.probe.SuccessThreshold != 2 {
		t.Errorf("probe %+v", c.probe)
	}
	if p := c.proxy(); p.Revision != "default/hello-00001" || p.Instance != "hello-00001-deployment-x" {
		t.Errorf("names %+v", p)
	}
	if len(c.notes) != 0 {
		t.Errorf("notes %q", c.notes)
	}
}

func TestConfigureDefaults(t *testing.T) {
	c, err := configure(nil, environment(), io.Discard)
	if err != nil {
		t.Fatal(err)
	}
	if c.listen != ":8012" || c.upstream != "127.0.0.1:8080" || c.concurrency != 0 || c.total != 300*time.Second || c.responseStart != 0 || c.probe == nil || c.drainCancel != time.Second {
		t.Errorf("%+v", c)
	}
}

// Flags win over the environment; with --listen there is no environment.
func TestConfigurePrecedence(t *testing.T) {
	env := environment("CONTAINER_CONCURRENCY", "10", "USER_PORT", "9000", "REVISION_TIMEOUT_SECONDS", "bad only if read")
	if _, err := configure(nil, env, io.Discard); err == nil {
		t.Error("the environment was not read")
	}
	env = environment("CONTAINER_CONCURRENCY", "10", "USER_PORT", "9000")
	c, err := configure([]string{"--concurrency", "3", "--queue", "0", "--timeout", "2s", "--max-wait", "1s", "--admin", ""}, env, io.Discard)
	if err != nil || c.concurrency != 3 || c.queue != -1 || c.total != 2*time.Second || c.maxWait != time.Second || c.admin != "" || c.upstream != "127.0.0.1:9000" || c.stats != ":9090" {
		t.Errorf("%v, %+v", err, c)
	}
	env = environment("CONTAINER_CONCURRENCY", "bad", "USER_PORT", "bad")
	c, err = configure([]string{"--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:1"}, env, io.Discard)
	if err != nil || c.admin+c.stats+c.metrics != "" || c.probe != nil || c.total != 0 || c.concurrency != 0 {
		t.Errorf("%v, %+v", err, c)
	}
}

// Everything that is wrong is named, in one go, with what was expected.
func TestConfigureErrors(t *testing.T) {
	for _, c := range []struct {
		args []string
		env  []string
		want []string
	}{
		{nil, []string{"CONTAINER_CONCURRENCY", "many", "USER_PORT", "70000", "REVISION_TIMEOUT_SECONDS", "-1", "SERVING_READINESS_PROBE", "{"},
			[]string{`CONTAINER_CONCURRENCY="many": expected a number from 0 to 1048576`, `USER_PORT="70000": expected a number from 1 to 65535`,
				`REVISION_TIMEOUT_SECONDS="-1": expected a number from 0 to`, "SERVING_READINESS_PROBE: unexpected end of JSON"}},
		{nil, []string{"SERVING_READINESS_PROBE", "[]"}, []string{"0 probes, expected one"}},
		{[]string{"--listen", "127.0.0.1:1"}, nil, []string{"--upstream is missing"}},
		{[]string{"--listen", "8080", "--upstream", "there"}, nil, []string{`--listen "8080": expected HOST:PORT`, `--upstream "there": expected HOST:PORT`}},
		{[]string{"--concurrency", "-1", "--queue", "-2", "--timeout", "-1s", "--drain-quiet", "-1s"}, nil,
			[]string{"--concurrency -1: expected 0 or more", "--queue -2", "--timeout -1s", "--drain-quiet -1s"}},
		{[]string{"--upstream-protocol", "h3"}, nil, []string{"expected auto, h1 or h2c"}},
		{[]string{"--log-level", "loud"}, nil, []string{"--log-level"}},
		{[]string{"--what"}, nil, []string{"not defined: -what"}},
		{[]string{"more"}, nil, []string{`unexpected argument "more"`}},
		{[]string{"--concurrency", "x"}, nil, []string{`invalid value "x"`}},
		{[]string{"--readiness-probe", "nonsense"}, nil, []string{"--readiness-probe: invalid character"}},
	} {
		_, err := configure(c.args, environment(c.env...), io.Discard)
		for _, want := range c.want {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%q %q: got %v, want …%s…", c.args, c.env, err, want)
			}
		}
	}
	if _, err := configure([]string{"-h"}, environment(), io.Discard); err != flag.ErrHelp {
		t.Errorf("-h: %v", err)
	}
}

func TestConfigureNotes(t *testing.T) {
	c, err := configure(nil, environment("QUEUE_SERVING_PORT", "8013", "ENABLE_HTTP2_AUTO_DETECTION", "true", "SERVING_REQUEST_LOG_TEMPLATE", "{{.}}"), io.Discard)
	if err != nil || len(c.notes) != 1 || c.protocol != "h2c" {
		t.Fatal(err, c.notes)
	}
	if c, err = configure(nil, environment("QUEUE_SERVING_PORT", "8012"), io.Discard); err != nil || c.protocol != "auto" {
		t.Fatal(err, c.protocol)
	}
}

func TestReadProbe(t *testing.T) {
	for _, c := range []struct{ in, kind string }{
		{"", "none"}, {"  ", "none"}, {"{}", "none"},
		{`{"exec":{"command":["true"]},"periodSeconds":3}`, "tcp"},
		{`[{"grpc":{"port":8080}}]`, "grpc"},
		{`{"tcpSocket":{"port":"http1"}}`, "tcp"},
	} {
		p, err := readProbe(c.in)
		if err != nil {
			t.Errorf("%s: %v", c.in, err)
			continue
		}
		kind := "none"
		switch {
		case p.Exec != nil:
			kind = "exec"
		case p.TCPSocket != nil:
			kind = "tcp"
		case p.GRPC != nil:
			kind = "grpc"
		}
		if kind != c.kind {
			t.Errorf("%s is %s, want %s", c.in, kind, c.kind)
		}
	}
}

func FuzzReadProbe(f *testing.F) {
	f.Add(`{"httpGet":{"path":"/","port":8080}}`)
	f.Add(`[{"tcpSocket":{"port":"x"}}]`)
	f.Add(`{"exec":{}}`)
	f.Fuzz(func(t *testing.T, s string) {
		p, err := readProbe(s)
		if err == nil && (p == nil || p.Exec != nil) {
			t.Fatalf("%q gave %+v", s, p)
		}
	})
}
