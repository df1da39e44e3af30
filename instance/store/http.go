package store

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"log/slog"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

// The wire:
//
//	GET    /packages/SUM          the bytes; Range with one range "bytes=N-" is honoured
//	PUT    /packages/SUM          201, or 422 if the bytes are others than SUM says, or 413
//	POST   /packages/SUM/verify   204, or 410 if the package was corrupt and has been dropped
//	DELETE /packages/SUM          204
//	GET    /packages              one JSON object a line: {"sum", "size", "stored"}
//
// Every error has a line of text as its body.

// Handler serves a store over HTTP. It asks nobody who they are: it belongs on a network of its own, or behind something that does.
func Handler(s Store, log *slog.Logger) http.Handler {
	h := &handler{s, log}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /packages/{sum}", h.get)
	mux.HandleFunc("PUT /packages/{sum}", h.put)
	mux.HandleFunc("POST /packages/{sum}/verify", h.verify)
	mux.HandleFunc("DELETE /packages/{sum}", h.remove)
	mux.HandleFunc("GET /packages", h.list)
	mux.HandleFunc("GET /healthz", func(http.ResponseWriter, *http.Request) {})
	return mux
}

type handler struct {
	store Store
	log   *slog.Logger
}

// sum takes the name out of the path; "" after it has answered itself.
func (h *handler) sum(w http.ResponseWriter, r *http.Request) string {
	sum := r.PathValue("sum")
	if err := Check(sum); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return ""
	}
	return sum
}

func (h *handler) fail(w http.ResponseWriter, r *http.Request, err error) {
	code := http.StatusInternalServerError
	switch {
	case errors.Is(err, ErrNotFound):
		code = http.StatusNotFound
	case errors.Is(err, ErrTooLarge):
		code = http.StatusRequestEntityTooLarge
	case errors.Is(err, ErrCorrupt):
		code = http.StatusUnprocessableEntity
	}
	if code == http.StatusInternalServerError && r.Context().Err() == nil {
		h.log.Warn("package store", "method", r.Method, "path", r.URL.Path, "err", err)
	}
	http.Error(w, err.Error(), code)
}

func (h *handler) get(w http.ResponseWriter, r *http.Request) {
	sum := h.sum(w, r)
	if sum == "" {
		return
	}
	var offset int64
	if s, ok := strings.CutPrefix(r.Header.Get("Range"), "bytes="); ok {
		// Other ranges than to the end are answered with all, which HTTP allows.
		if from, ok := strings.CutSuffix(s, "-"); ok {
			offset, _ = strconv.ParseInt(from, 10, 64)
			offset = min(max(offset, 0), MaxBytes+1)
		}
	}
	body, size, err := h.store.Open(r.Context(), sum, offset)
	if err != nil {
		h.fail(w, r, err)
		return
	}
	defer body.Close()
	if offset > size || offset == size && size > 0 {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes */%d", size))
		http.Error(w, fmt.Sprintf("the package has %d bytes", size), http.StatusRequestedRangeNotSatisfiable)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	w.Header().Set("Accept-Ranges", "bytes")
	w.Header().Set("Content-Length", strconv.FormatInt(size-offset, 10))
	if offset > 0 {
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/%d", offset, size-1, size))
		w.WriteHeader(http.StatusPartialContent)
	}
	if r.Method != http.MethodHead {
		_, _ = io.CopyN(w, body, size-offset) // a client that gets less sees it by the length
	}
}

func (h *handler) put(w http.ResponseWriter, r *http.Request) {
	if sum := h.sum(w, r); sum == "" {
	} else if err := h.store.Put(r.Context(), sum, http.MaxBytesReader(w, r.Body, MaxBytes+1)); err != nil {
		h.fail(w, r, err)
	} else {
		w.WriteHeader(http.StatusCreated)
	}
}

func (h *handler) verify(w http.ResponseWriter, r *http.Request) {
	sum := h.sum(w, r)
	if sum == "" {
		return
	}
	switch err := h.store.Verify(r.Context(), sum); {
	case errors.Is(err, ErrCorrupt):
		h.log.Warn("package store: dropped", "err", err)
		http.Error(w, err.Error(), http.StatusGone)
	case err != nil:
		h.fail(w, r, err)
	default:
		w.WriteHeader(http.StatusNoContent)
	}
}

func (h *handler) remove(w http.ResponseWriter, r *http.Request) {
	if sum := h.sum(w, r); sum == "" {
	} else if err := h.store.Remove(r.Context(), sum); err != nil {
		h.fail(w, r, err)
	} else {
		w.WriteHeader(http.StatusNoContent)
	}
}

// line is an Entry on the wire; Error ends a list that could not be completed.
type line struct {
	Sum    string    `json:"sum,omitempty"`
	Size   int64     `json:"size,omitempty"`
	Stored time.Time `json:"stored,omitzero"`
	Error  string    `json:"error,omitempty"`
	End    bool      `json:"end,omitempty"` // the last line of a complete list
}

func (h *handler) list(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	enc := json.NewEncoder(w)
	for e, err := range h.store.List(r.Context()) {
		if err != nil {
			_ = enc.Encode(line{Error: err.Error()})
			return
		}
		if enc.Encode(line{Sum: e.Sum, Size: e.Size, Stored: e.Stored}) != nil {
			return
		}
	}
	_ = enc.Encode(line{End: true})
}

// Remote is a store behind a Handler.
type Remote struct {
	base   string
	client *http.Client
}

// NewRemote returns the store at a URL like http://store:8090.
func NewRemote(base string) (*Remote, error) {
	u, err := url.Parse(base)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("package store %q: want a URL like http://store:8090", base)
	}
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.MaxIdleConnsPerHost, t.ResponseHeaderTimeout, t.DisableCompression = 8, 30*time.Second, true
	return &Remote{strings.TrimSuffix(base, "/"), &http.Client{Transport: t}}, nil
}

// do returns an answer of one of the wanted codes; any other becomes an error.
func (s *Remote) do(ctx context.Context, method, path string, body io.Reader, offset int64, want ...int) (*http.Response, error) {
	req, err := http.NewRequestWithContext(ctx, method, s.base+path, body)
	if err != nil {
		return nil, fmt.Errorf("package store: %w", err)
	}
	if offset > 0 {
		req.Header.Set("Range", fmt.Sprintf("bytes=%d-", offset))
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return nil, fmt.Errorf("package store: %w", err)
	}
	for _, code := range want {
		if resp.StatusCode == code {
			return resp, nil
		}
	}
	defer resp.Body.Close()
	text, _ := io.ReadAll(io.LimitReader(resp.Body, 1<<10))
	kind := errors.New("package store")
	switch resp.StatusCode {
	case http.StatusNotFound:
		kind = ErrNotFound
	case http.StatusRequestEntityTooLarge:
		kind = ErrTooLarge
	case http.StatusUnprocessableEntity, http.StatusGone:
		kind = ErrCorrupt
	}
	return nil, fmt.Errorf("%w: %s %s: %s: %s", kind, method, s.base+path, resp.Status, strings.TrimSpace(string(text)))
}

// Open implements Store.
func (s *Remote) Open(ctx context.Context, sum string, offset int64) (io.ReadCloser, int64, error) {
	if err := Check(sum); err != nil {
		return nil, 0, err
	}
	want := http.StatusOK
	if offset > 0 {
		want = http.StatusPartialContent
	}
	resp, err := s.do(ctx, http.MethodGet, "/packages/"+sum, nil, offset, want)
	if err != nil {
		return nil, 0, err
	}
	if resp.ContentLength < 0 {
		resp.Body.Close()
		return nil, 0, fmt.Errorf("package store: %s/packages/%s was answered without a length", s.base, sum)
	}
	return resp.Body, offset + resp.ContentLength, nil
}

// Put implements Store.
func (s *Remote) Put(ctx context.Context, sum string, r io.Reader) error {
	if err := Check(sum); err != nil {
		return err
	}
	return s.discard(s.do(ctx, http.MethodPut, "/packages/"+sum, io.NopCloser(r), 0, http.StatusCreated))
}

func (s *Remote) discard(resp *http.Response, err error) error {
	if err == nil {
		resp.Body.Close()
	}
	return err
}

// Verify implements Store, on the other side.
func (s *Remote) Verify(ctx context.Context, sum string) error {
	if err := Check(sum); err != nil {
		return err
	}
	return s.discard(s.do(ctx, http.MethodPost, "/packages/"+sum+"/verify", nil, 0, http.StatusNoContent))
}

// Remove implements Store.
func (s *Remote) Remove(ctx context.Context, sum string) error {
	if err := Check(sum); err != nil {
		return err
	}
	return s.discard(s.do(ctx, http.MethodDelete, "/packages/"+sum, nil, 0, http.StatusNoContent))
}

// List implements Store.
func (s *Remote) List(ctx context.Context) iter.Seq2[Entry, error] {
	return func(yield func(Entry, error) bool) {
		resp, err := s.do(ctx, http.MethodGet, "/packages", nil, 0, http.StatusOK)
		if err != nil {
			yield(Entry{}, err)
			return
		}
		defer resp.Body.Close()
		for dec := json.NewDecoder(resp.Body); ; {
			var l line
			err := dec.Decode(&l)
			switch {
			case err == nil && l.End:
				return
			case err == nil && l.Error != "":
				err = errors.New(l.Error)
			case err == nil:
				err = Check(l.Sum)
			}
			if err != nil {
				yield(Entry{}, fmt.Errorf("package store: list: %w", err)) // an end without its mark is a broken list
				return
			}
			if !yield(Entry{Sum: l.Sum, Size: l.Size, Stored: l.Stored}, nil) {
				return
			}
		}
	}
}
