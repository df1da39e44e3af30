package sim

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"io"
	"strings"
	"testing"

	"github.com/thawrun/thaw/autoscaler/planner"
)

// remote is a policy at the other end of the line protocol.
type remote struct {
	t    *testing.T
	in   *bufio.Reader
	out  io.WriteCloser
	done chan error
}

func dial(t *testing.T, p Policy) *remote {
	toServer, out := io.Pipe()
	in, fromServer := io.Pipe()
	r := &remote{t: t, in: bufio.NewReader(in), out: out, done: make(chan error, 1)}
	go func() { r.done <- Serve(toServer, fromServer, p); fromServer.Close() }()
	return r
}

func (r *remote) ask(question, answer any) {
	b, err := json.Marshal(question)
	if err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.out.Write(append(b, '\n')); err != nil {
		r.t.Fatal(err)
	}
	line, err := r.in.ReadBytes('\n')
	if err != nil {
		r.t.Fatal(err)
	}
	if err := json.Unmarshal(line, answer); err != nil {
		r.t.Fatalf("%s: %v", line, err)
	}
}

func (r *remote) Hello(h *Hello) (answer Ready) {
	r.ask(h, &answer)
	return answer
}

func (r *remote) Tick(t *Tick) []Order2 {
	var answer Scale
	r.ask(t, &answer)
	if answer.T != t.T || answer.Type != "scale" {
		r.t.Fatalf("tick %v answered with %+v", t.T, answer)
	}
	return answer.Orders
}

// Behind the protocol the planner decides as it does in the process, to the last instance.
func TestServe(t *testing.T) {
	tr := synthetic(1)
	local, err := Run(context.Background(), tr, NewPredictive(planner.DefaultConfig()), Options{})
	if err != nil {
		t.Fatal(err)
	}
	r := dial(t, NewPredictive(planner.DefaultConfig()))
	distant, err := Run(context.Background(), tr, r, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(r.out, `{"type":"end"}`+"\n"); err != nil {
		t.Fatal(err)
	}
	if err := <-r.done; err != nil {
		t.Error(err)
	}
	if local.InstanceSeconds != distant.InstanceSeconds || local.Cold != distant.Cold || local.Waited != distant.Waited {
		t.Errorf("in the process %+v\nbehind the protocol %+v", local, distant)
	}
}

const hello = `{"type":"hello","version":1,"horizon_s":60,"max_instances":10,"functions":[{"i":0,"name":"f","app":"a","concurrency":1}]}` + "\n"

func TestServeExample(t *testing.T) {
	var out bytes.Buffer
	in := hello +
		`{"type":"tick","t":1,"f":[{"i":0,"c":[2.6],"m":3,"n":3,"q":2,"run":1,"r":1,"w":1}]}` + "\n" +
		`{"type":"tick","t":2,"f":[{"i":0,"c":[0],"d":3,"r":3,"w":3,"l":210.5,"cs":[800,900]}]}` + "\n" +
		`{"type":"end"}` + "\n"
	if err := Serve(strings.NewReader(in), &out, NewPredictive(planner.DefaultConfig())); err != nil {
		t.Fatal(err)
	}
	want := `{"type":"ready","name":"predictive","interval_s":1,"on_demand":"zero"}
{"type":"scale","t":1,"d":[[0,3]]}
{"type":"scale","t":2,"d":[]}
`
	if out.String() != want {
		t.Errorf("got\n%swant\n%s", out.String(), want)
	}
}

func TestServeBadInput(t *testing.T) {
	for name, in := range map[string]string{
		"no json":             "scale!\n",
		"type":                `{"type":"tock"}` + "\n",
		"tick first":          `{"type":"tick","t":1}` + "\n",
		"version":             strings.Replace(hello, `"version":1`, `"version":2`, 1),
		"no functions":        `{"type":"hello","version":1}` + "\n",
		"numbering":           strings.Replace(hello, `"i":0`, `"i":5`, 1),
		"concurrency":         strings.Replace(hello, `"concurrency":1`, `"concurrency":0`, 1),
		"twice":               hello + hello,
		"unknown function":    hello + `{"type":"tick","t":1,"f":[{"i":1}]}` + "\n",
		"negative":            hello + `{"type":"tick","t":1,"f":[{"i":0,"n":-1}]}` + "\n",
		"time":                hello + `{"type":"tick","t":5}` + "\n" + `{"type":"tick","t":4}` + "\n",
		"time without end":    hello + `{"type":"tick","t":1e15}` + "\n",
		"time before zero":    hello + `{"type":"tick","t":-1}` + "\n",
		"call":                hello + `{"type":"tick","t":5,"calls":[[0,1,1]]}` + "\n",
		"shift":               hello + `{"type":"tick","t":5,"shifts":[{"at":6,"from":0,"to":0,"weight":2}]}` + "\n",
		"shift to nowhere":    hello + `{"type":"tick","t":5,"shifts":[{"at":6,"from":0,"to":-1,"weight":1}]}` + "\n",
		"number out of range": hello + `{"type":"tick","t":1e999}` + "\n",
	} {
		if err := Serve(strings.NewReader(in), io.Discard, NewPredictive(planner.DefaultConfig())); err == nil || !strings.Contains(err.Error(), "line ") {
			t.Errorf("%s: error %v, want one that names the line", name, err)
		}
	}
}

func FuzzServe(f *testing.F) {
	f.Add(hello + `{"type":"tick","t":1,"f":[{"i":0,"c":[2.6],"m":3,"n":3,"q":2,"run":1,"r":1,"w":1,"l":3,"cs":[5]}],"calls":[[0,0,1]],"shifts":[{"at":2,"from":0,"to":0,"weight":1}]}` + "\n")
	f.Fuzz(func(t *testing.T, in string) {
		var out bytes.Buffer
		Serve(strings.NewReader(in), &out, NewPredictive(planner.DefaultConfig()))
		for line := range strings.Lines(out.String()) {
			if !json.Valid([]byte(line)) {
				t.Fatalf("answered %q", line)
			}
		}
	})
}
