package wire

import (
	"bytes"
	"errors"
	"math"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

var when = time.Unix(1_700_000_000, 123_456_789)

func sample() *Frame {
	return &Frame{
		Sequence: 7, Reporter: "node-1", Agent: true, Capacity: 200, Synced: true, Told: []Claim{{Shard: 5, Epoch: 9}, {}},
		Stats: []endpoints.Stat{
			{Revision: "default/a-00001", Source: "i-1", Time: when, Concurrency: 3.25, ProxiedConcurrency: 1, Requests: 17, ProxiedRequests: 5},
			{Revision: "default/b-00001", Source: "activator", Activator: true, Time: when},
		},
		Demands: []endpoints.Demand{{Revision: "default/a-00001", Waiting: 1000, Running: 3, At: when}, {}},
		Snapshots: []*endpoints.Snapshot{{
			Revision: "default/a-00001", Sequence: 4, Desired: 3,
			Instances: []endpoints.Instance{
				{ID: "i-1", Revision: "default/a-00001", State: endpoints.Ready, Addr: "127.0.0.1:9", Capacity: 10, Adopted: true,
					Start: endpoints.StartTimes{Decided: when, Ready: when.Add(time.Second)}},
				{ID: "i-2", Revision: "default/a-00001", State: endpoints.Draining},
			},
			Failure: &endpoints.Failure{Reason: "ExitCode1", Message: "no", Count: 2, At: when, Until: when.Add(time.Second), Served: true},
		}},
		Calls:  []endpoints.Call{{Caller: "default/a-00001", Callee: "default/b-00001", N: 7}, {}},
		Shifts: []endpoints.Shift{{From: "default/a-00001", To: "default/a-00002", Weight: 0.25}, {}},
		Asks:   []api.RevisionID{"default/a-00001", ""},
	}
}

func TestThereAndBack(t *testing.T) {
	for _, c := range []struct{ in, out any }{
		{sample(), &Frame{}}, {&Frame{}, &Frame{}},
		{&Orders{Orders: []Order{{Revision: "default/a-00001", N: 3, Decided: when, Epoch: 12, AtLeast: true}, {}}, Claims: []Claim{{Shard: 63, Epoch: 99}, {}},
			Learn: true, Ready: []endpoints.Shift{{From: "default/a-00001", To: "default/a-00002", Weight: 1}},
			Said: []Said{{Revision: "default/a-00001", Text: []byte("{}")}, {}}}, &Orders{}},
	} {
		b, err := Codec{}.Marshal(c.in)
		if err != nil {
			t.Fatal(err)
		}
		if err := (Codec{}).Unmarshal(b, c.out); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(c.in, c.out, cmpopts.EquateEmpty()); diff != "" {
			t.Error(diff)
		}
	}
}

// A message of a later version, with fields that we do not know, is understood as far as we know it.
func TestLaterVersion(t *testing.T) {
	b, _ := Codec{}.Marshal(sample())
	b = protowire.AppendVarint(protowire.AppendTag(b, 100, protowire.VarintType), 1)
	b = protowire.AppendFixed32(protowire.AppendTag(b, 101, protowire.Fixed32Type), 1)
	b = protowire.AppendString(protowire.AppendTag(b, 102, protowire.BytesType), "new")
	var f Frame
	if err := (Codec{}).Unmarshal(b, &f); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(sample(), &f); diff != "" {
		t.Error(diff)
	}
}

func TestGarbage(t *testing.T) {
	whole, _ := Codec{}.Marshal(sample())
	for i := 1; i < len(whole); i++ { // cut anywhere: an error or a shorter message, no panic
		_ = Codec{}.Unmarshal(whole[:i], &Frame{})
	}
	for _, b := range [][]byte{{0xff}, {0x0a}, message(nil, 5, message(nil, 4, number(nil, 2, 9))), make([]byte, MaxFrame+1)} {
		if err := (Codec{}).Unmarshal(b, &Frame{}); !errors.Is(err, ErrFormat) {
			t.Errorf("% x…: %v", b[:1], err)
		}
	}
	if err := (Codec{}).Unmarshal(message(nil, 2, number(nil, 1, 64)), &Orders{}); !errors.Is(err, ErrFormat) {
		t.Errorf("a shard that is none: %v", err)
	}
	if err := (Codec{}).Unmarshal(bytes.Repeat(message(nil, 3, nil), MaxItems+1), &Frame{}); !errors.Is(err, ErrFormat) {
		t.Errorf("more reports than a frame may have: %v", err)
	}
	if err := (Codec{}).Unmarshal(bytes.Repeat(message(nil, 1, nil), MaxItems+1), &Orders{}); !errors.Is(err, ErrFormat) {
		t.Errorf("more orders than a message may have: %v", err)
	}
	if err := (Codec{}).Unmarshal(message(nil, 5, bytes.Repeat(message(nil, 4, nil), MaxItems)), &Frame{}); !errors.Is(err, ErrFormat) {
		t.Errorf("more instances than a frame may have: %v", err)
	}
	for _, field := range []protowire.Number{10, 11} {
		if err := (Codec{}).Unmarshal(bytes.Repeat(message(nil, field, nil), MaxItems+1), &Frame{}); !errors.Is(err, ErrFormat) {
			t.Errorf("more calls or shifts than a frame may have: %v", err)
		}
	}
	if err := (Codec{}).Unmarshal(message(nil, 10, number(nil, 3, -1)), &Frame{}); !errors.Is(err, ErrFormat) {
		t.Errorf("a call made -1 times: %v", err)
	}
	for _, field := range []protowire.Number{2, 3} {
		if err := (Codec{}).Unmarshal(message(nil, 4, number(nil, field, -1)), &Frame{}); !errors.Is(err, ErrFormat) {
			t.Errorf("a demand of -1: %v", err)
		}
	}
	for _, n := range []int64{-1, math.MaxInt32 + 1} {
		if err := (Codec{}).Unmarshal(message(nil, 1, number(nil, 2, n)), &Orders{}); !errors.Is(err, ErrFormat) {
			t.Errorf("an order for %d: %v", n, err)
		}
	}
}

// FuzzFrame: what can be read can be written and read again with the same content.
func FuzzFrame(f *testing.F) {
	whole, _ := Codec{}.Marshal(sample())
	f.Add(whole)
	f.Add([]byte{0x1a, 0x02, 0x29, 0x00})
	f.Fuzz(func(t *testing.T, b []byte) { readable(t, b, &Frame{}, &Frame{}) })
}

// FuzzOrders: the same for the other direction.
func FuzzOrders(f *testing.F) {
	whole, _ := Codec{}.Marshal(&Orders{Orders: []Order{{Revision: "default/a-00001", N: 3, Decided: when, Epoch: 12, AtLeast: true}}, Claims: []Claim{{Shard: 63, Epoch: 99}}, Learn: true, Ready: []endpoints.Shift{{From: "default/a-00001", Weight: 1}}, Said: []Said{{Revision: "default/a-00001", Text: []byte("{}")}}})
	f.Add(whole)
	f.Add([]byte{0x12, 0x02, 0x08, 0x40})
	f.Fuzz(func(t *testing.T, b []byte) { readable(t, b, &Orders{}, &Orders{}) })
}

func readable(t *testing.T, b []byte, one, two any) {
	if (Codec{}).Unmarshal(b, one) != nil {
		return
	}
	again, err := Codec{}.Marshal(one)
	if err != nil {
		t.Fatal(err)
	}
	if err := (Codec{}).Unmarshal(again, two); err != nil {
		t.Fatal(err)
	}
	last, _ := Codec{}.Marshal(two)
	if string(last) != string(again) {
		t.Fatalf("% x\n% x", again, last)
	}
}

// BenchmarkFrame is a second's reports of 1,000 revisions there and back.
func BenchmarkFrame(b *testing.B) {
	f := &Frame{Sequence: 1}
	for range 1000 {
		f.Stats = append(f.Stats, sample().Stats[0])
	}
	b.ReportAllocs()
	for b.Loop() {
		buf, _ := Codec{}.Marshal(f)
		var g Frame
		if err := (Codec{}).Unmarshal(buf, &g); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/1000, "ns/report")
}
