package cluster

import (
	"cmp"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"

	"github.com/thawrun/thaw/cmd/thaw/replica"
	"github.com/thawrun/thaw/control/apiserver"
	"github.com/thawrun/thaw/internal/client"
	"github.com/thawrun/thaw/internal/endpoints"
	"github.com/thawrun/thaw/internal/feed"
	"github.com/thawrun/thaw/internal/state"
)

// roster answers about the nodes, and takes operators' wishes about them.
type roster struct {
	store state.Store
	feed  *feed.Client
	addrs atomic.Pointer[map[string]string] // of their feeds, by name
}

func (r *roster) set(addrs map[string]string) {
	r.addrs.Store(&addrs)
	r.feed.SetAgents(addrs)
}

func (r *roster) there() map[string]string {
	if m := r.addrs.Load(); m != nil {
		return *m
	}
	return nil
}

// register adds the paths of nodes.
func (r *roster) register(mux *http.ServeMux) {
	mux.HandleFunc("GET "+extra+"/nodes", r.list)
	mux.HandleFunc("PUT "+extra+"/nodes/{name}", r.put)
}

func (r *roster) list(w http.ResponseWriter, req *http.Request) {
	wishes, _, err := replica.Wishes(req.Context(), r.store)
	if err != nil {
		failState(w, err)
		return
	}
	there := r.there()
	names := map[string]bool{}
	for name := range there {
		names[name] = true
	}
	for name := range wishes {
		names[name] = true
	}
	nodes := []client.Node{}
	for _, name := range slices.Sorted(maps.Keys(names)) {
		n := client.Node{Name: name, Address: there[name], State: "ready", Scheduling: cmp.Or(wishes[name].Scheduling, replica.SchedulingOn)}
		parts, heard := r.feed.Of(name)
		switch {
		case n.Address == "":
			n.State = "gone"
		case !heard:
			n.State = "silent"
		}
		for _, sn := range parts {
			n.Instances += sn.Count(endpoints.Starting) + sn.Count(endpoints.Ready)
			n.Draining += sn.Count(endpoints.Draining)
			n.Frozen += sn.Count(endpoints.Frozen)
		}
		nodes = append(nodes, n)
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"nodes": nodes})
}

func (r *roster) put(w http.ResponseWriter, req *http.Request) {
	name := req.PathValue("name")
	var wish replica.Wish
	if err := json.NewDecoder(io.LimitReader(req.Body, 1<<10)).Decode(&wish); err != nil {
		apiserver.Fail(w, http.StatusBadRequest, "BadRequest", "the body is no wish about a node: "+err.Error())
		return
	}
	key := replica.NodesPrefix + name
	var err error
	switch wish.Scheduling {
	case replica.SchedulingOn:
		if _, err = r.store.Delete(req.Context(), key, state.Any); errors.Is(err, state.ErrNotFound) {
			err = nil
			if r.there()[name] == "" {
				noNode(w, name)
				return
			}
		}
	case replica.SchedulingCordon, replica.SchedulingDrained:
		if r.there()[name] == "" || strings.Contains(name, "/") {
			noNode(w, name)
			return
		}
		value, _ := json.Marshal(wish)
		_, err = r.store.Put(req.Context(), key, value, state.Any)
	default:
		apiserver.Fail(w, http.StatusUnprocessableEntity, "Invalid", "scheduling "+strconv.Quote(wish.Scheduling)+": on, cordoned or draining")
		return
	}
	if err != nil {
		failState(w, err)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func noNode(w http.ResponseWriter, name string) {
	apiserver.Fail(w, http.StatusNotFound, "NotFound", "there is no node "+strconv.Quote(name))
}

// failState is the answer when the shared state does not take a question or a change.
func failState(w http.ResponseWriter, err error) {
	if errors.Is(err, state.ErrUnavailable) {
		w.Header().Set("Retry-After", "1")
		apiserver.Fail(w, http.StatusServiceUnavailable, "ServiceUnavailable", "the state store does not answer; running services are not affected")
		return
	}
	apiserver.Fail(w, http.StatusInternalServerError, "InternalError", err.Error())
}
