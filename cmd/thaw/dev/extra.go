package dev

import (
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/cmd/thaw/scaling"
	"github.com/thawrun/thaw/control/apiserver"
	"github.com/thawrun/thaw/instance/code"
	"github.com/thawrun/thaw/instance/logs"
)

// extraPrefix is where the endpoints live that are not objects: logs, packages, and how a revision scales.
const extraPrefix = "/apis/thaw.run/v1alpha1"

// maxPackage bounds the body of an upload; what is in it is bounded by instance/code.
const maxPackage = 1 << 30

func (s *Server) extra() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+extraPrefix+"/namespaces/{ns}/logs", s.logs)
	mux.HandleFunc("POST "+extraPrefix+"/packages", s.upload)
	mux.HandleFunc("GET "+extraPrefix+"/namespaces/{ns}/revisions/{name}/scale", s.scale)
	return mux
}

// logs writes lines as NDJSON; with follow=true until the client leaves.
func (s *Server) logs(w http.ResponseWriter, r *http.Request) {
	v := r.URL.Query()
	q := logs.Query{Namespace: r.PathValue("ns"), Service: v.Get("service"), Revision: v.Get("revision"), Instance: v.Get("instance"), Follow: v.Get("follow") == "true"}
	if t := v.Get("tail"); t != "" {
		n, err := strconv.Atoi(t)
		if err != nil {
			apiserver.Fail(w, http.StatusBadRequest, "BadRequest", "tail="+strconv.Quote(t)+" is not a number")
			return
		}
		q.Tail = n
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	rc := http.NewResponseController(w)
	rc.Flush()
	enc := json.NewEncoder(w)
	for line, err := range s.agent.Logs(r.Context(), q) {
		if err != nil || enc.Encode(line) != nil {
			return
		}
		if q.Follow {
			rc.Flush()
		}
	}
}

func (s *Server) upload(w http.ResponseWriter, r *http.Request) {
	p, err := s.agent.Upload(r.Context(), http.MaxBytesReader(w, r.Body, maxPackage))
	var big *http.MaxBytesError
	switch {
	case errors.As(err, &big):
		apiserver.Fail(w, http.StatusRequestEntityTooLarge, "RequestEntityTooLarge", "the package is larger than 1 GiB")
	case errors.Is(err, code.ErrBadPackage):
		apiserver.Fail(w, http.StatusUnprocessableEntity, "Invalid", err.Error())
	case err != nil:
		apiserver.Fail(w, http.StatusInternalServerError, "InternalError", err.Error())
	default:
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(http.StatusCreated)
		json.NewEncoder(w).Encode(p)
	}
}

func (s *Server) scale(w http.ResponseWriter, r *http.Request) {
	id := api.MakeRevisionID(r.PathValue("ns"), r.PathValue("name"))
	st, ok := s.scaler.Status(id)
	if !ok {
		apiserver.Fail(w, http.StatusNotFound, "NotFound", "revision "+string(id)+" is not known to the autoscaler")
		return
	}
	waiting, running := s.act.Load(id)
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(scaling.Of(st, s.agent.FrozenOf(id), waiting, running, time.Now()))
}
