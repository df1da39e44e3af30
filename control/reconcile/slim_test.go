package reconcile

import (
	"encoding/json"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"unsafe"

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

// What a revision says with the words of others is the same as before; equal words are kept once, and what many objects have of
// their own does not pile up.
func TestWords(t *testing.T) {
	const revision = `{"kind":"Revision","apiVersion":"serving.knative.dev/v1","metadata":{"name":"a-00001","namespace":"default","uid":"u",
		"labels":{"x":"1","serving.knative.dev/configuration":"a"},"annotations":{"y":"2"},
		"ownerReferences":[{"apiVersion":"serving.knative.dev/v1","kind":"Configuration","name":"a","uid":"w","controller":true}]},
		"spec":{"containers":[{"name":"c","image":"one","args":["b"],"env":[{"name":"A","value":"B"}],"ports":[{"name":"h2c","containerPort":80}],
			"readinessProbe":{"tcpSocket":{"port":80}}}],"timeoutSeconds":3},
		"status":{"observedGeneration":1,"conditions":[{"type":"Ready","status":"True","reason":"Because"}],"actualReplicas":0,
			"containerStatuses":[{"name":"c","imageDigest":"d"}]}}`
	w := words{}
	a, b := decoded[api.Revision](t, revision), decoded[api.Revision](t, revision)
	x, y := w.revision(a), w.revision(b)
	for _, r := range []*api.Revision{a, x, y} {
		if want := decoded[api.Revision](t, revision); !reflect.DeepEqual(r, want) {
			t.Errorf("%+v\nis not %+v", r, want)
		}
	}
	if p, q := &x.Status.Conditions[0], &y.Status.Conditions[0]; unsafe.StringData(p.Reason) != unsafe.StringData(q.Reason) {
		t.Error("two revisions have a word each")
	}
	empty := &api.Revision{}
	if r := w.revision(empty); !reflect.DeepEqual(r, empty) {
		t.Errorf("an empty revision became %+v", r)
	}
	for i := range 3 * maxWords {
		w.of(strconv.Itoa(i))
	}
	if long := strings.Repeat("x", maxWord+1); w.of(long) != long {
		t.Error("a long word is another one")
	} else if _, kept := w[long]; kept {
		t.Error("a long word is kept")
	}
	if len(w) > maxWords {
		t.Errorf("%d words are kept", len(w))
	}
}
