package reconcile

import (
	"encoding/json"
	"reflect"
	"testing"

	"github.com/thawrun/thaw/api"
)

func decoded[T any](t *testing.T, data string) *T {
	t.Helper()
	o := new(T)
	if err := json.Unmarshal([]byte(data), o); err != nil {
		t.Fatal(err)
	}
	return o
}

// What the cache keeps says the same as what was decoded, and shares with its older version what they have
// in common, but never a spec of another revision of that name.
func TestSlim(t *testing.T) {
	const revision = `{"metadata":{"name":"a-00001","uid":"u","labels":{"x":"1"},"annotations":{"y":"2"},"ownerReferences":[{"kind":"Configuration","name":"a"}]},
		"spec":{"containers":[{"image":"one","args":["b"],"env":[{"name":"A","value":"B"}]}]},
		"status":{"conditions":[{"type":"Ready","status":"True"}],"containerStatuses":[{"name":"user-container","imageDigest":"d"}]}}`
	a, b := decoded[api.Revision](t, revision), decoded[api.Revision](t, revision)
	first := slimRevision(a, nil)
	second := slimRevision(b, first)
	for _, r := range []*api.Revision{first, second} {
		if !reflect.DeepEqual(r, a) {
			t.Errorf("%+v\nis not %+v", r, a)
		}
	}
	if &first.Spec.Containers[0] != &second.Spec.Containers[0] {
		t.Error("two versions of a revision have a spec each")
	}
	again := decoded[api.Revision](t, `{"metadata":{"name":"a-00001","uid":"v","labels":{"x":"3"}},"spec":{"containers":[{"image":"two"}]}}`)
	if r := slimRevision(again, second); !reflect.DeepEqual(r, again) {
		t.Errorf("a revision that was made anew is %+v", r)
	}
}
