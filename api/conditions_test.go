package api

import (
	"encoding/json"
	"testing"
	"time"
)

var noon = time.Date(2026, 11, 20, 12, 0, 0, 700_000_000, time.UTC)

func TestConditionsSet(t *testing.T) {
	var c Conditions
	if !c.Set(noon, "B", True, "", "") || !c.Set(noon, "A", Unknown, "Why", "text") || !c.SetInfo(noon, "C", False, "", "") {
		t.Error("a new condition is a change")
	}
	if len(c) != 3 || c[0].Type != "A" || c[1].Type != "B" || c[2].Type != "C" || c[2].Severity != SeverityInfo {
		t.Errorf("not sorted: %+v", c)
	}
	if c.Set(noon.Add(time.Hour), "A", Unknown, "Why", "text") {
		t.Error("the same again is no change")
	}
	if !c.Set(noon.Add(time.Hour), "A", Unknown, "Why", "other") || !c.Get("A").LastTransitionTime.Equal(noon.Truncate(time.Second)) {
		t.Errorf("a new message is a change but no transition: %+v", c.Get("A"))
	}
	if !c.Set(noon.Add(time.Hour), "A", True, "", "") || !c.Get("A").LastTransitionTime.Equal(noon.Add(time.Hour).Truncate(time.Second)) {
		t.Errorf("a new status is a transition: %+v", c.Get("A"))
	}
	if !c.Remove("B") || c.Remove("B") || c.Get("B") != nil || len(c) != 2 {
		t.Errorf("Remove: %+v", c)
	}
}

func TestConditionsSetLeavesSharedAlone(t *testing.T) {
	var c Conditions
	c.Set(noon, "A", True, "", "")
	c.Set(noon, "B", True, "", "")
	shared := c
	c.Set(noon, "A", False, "", "")
	c.Set(noon, "AA", False, "", "")
	c.Remove("B")
	if len(shared) != 2 || shared[0].Status != True || shared[1].Type != "B" {
		t.Errorf("a condition of another object was changed: %+v", shared)
	}
}

func TestConditionsSetSortsWhatIsNot(t *testing.T) {
	c := Conditions{{Type: "Z", Status: True}, {Type: "A", Status: True}, {Type: "M", Status: True}}
	c.Set(noon, "A", False, "", "")
	if len(c) != 3 || c[0].Type != "A" || c[0].Status != False || c[2].Type != "Z" {
		t.Errorf("%+v", c)
	}
}

func TestConditionsSurviveTheWire(t *testing.T) {
	var c, back Conditions
	c.Set(noon, "A", True, "", "")
	data, err := json.Marshal(c)
	if err != nil || json.Unmarshal(data, &back) != nil {
		t.Fatal(err)
	}
	if back.Set(noon.Add(time.Minute), "A", True, "", "") {
		t.Error("a condition changed by being stored")
	}
	if string(data) != `[{"type":"A","status":"True","lastTransitionTime":"2026-11-20T12:00:00Z"}]` {
		t.Errorf("%s", data)
	}
}

func TestSummarise(t *testing.T) {
	type cond struct {
		typ, status, reason string
		after               int // seconds
	}
	for _, tt := range []struct {
		name  string
		conds []cond
		want  string
	}{
		{"nothing known", nil, "Unknown  "},
		{"one absent", []cond{{"ConfigurationsReady", True, "", 0}}, "Unknown  "},
		{"all true", []cond{{"ConfigurationsReady", True, "", 0}, {"RoutesReady", True, "", 0}}, "True  "},
		{"unknown with a reason", []cond{{"ConfigurationsReady", Unknown, "Deploying", 0}, {"RoutesReady", True, "", 0}}, "Unknown Deploying why"},
		{"false beats unknown", []cond{{"ConfigurationsReady", Unknown, "A", 9}, {"RoutesReady", False, "B", 0}}, "False B why"},
		{"false beats absent", []cond{{"RoutesReady", False, "B", 0}}, "False B why"},
		{"the newest false", []cond{{"ConfigurationsReady", False, "A", 1}, {"RoutesReady", False, "B", 2}}, "False B why"},
		{"the first of equal age", []cond{{"ConfigurationsReady", False, "A", 1}, {"RoutesReady", False, "B", 1}}, "False A why"},
		{"others do not count", []cond{{"ConfigurationsReady", True, "", 0}, {"RoutesReady", True, "", 0}, {"Active", False, "NoTraffic", 0}}, "True  "},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var c Conditions
			for _, v := range tt.conds {
				message := "why"
				if v.reason == "" {
					message = ""
				}
				c.Set(noon.Add(time.Duration(v.after)*time.Second), v.typ, v.status, v.reason, message)
			}
			changed := c.Summarise(noon, ConditionReady, ReadyDependents(Services)...)
			ready := c.Get(ConditionReady)
			if got := ready.Status + " " + ready.Reason + " " + ready.Message; got != tt.want || !changed {
				t.Errorf("got %q, want %q (changed %v)", got, tt.want, changed)
			}
			if c.Summarise(noon.Add(time.Hour), ConditionReady, ReadyDependents(Services)...) {
				t.Error("the second time is no change")
			}
		})
	}
}

func TestReadyDependentsPerKind(t *testing.T) {
	want := map[*Kind]int{Services: 2, Configurations: 0, Revisions: 2, Routes: 3, DomainMappings: 4, Subnets: 3, Gateways: 2, ElasticIPs: 1}
	for _, k := range Kinds {
		if got := ReadyDependents(k); len(got) != want[k] {
			t.Errorf("%s: %v", k.Kind, got)
		}
	}
}
