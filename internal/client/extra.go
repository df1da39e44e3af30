package client

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"iter"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"time"
)

// The endpoints that Thaw adds to Knative's API.
const extraPrefix = "/apis/thaw.run/v1alpha1"

// LogLine is one line that an instance wrote.
type LogLine struct {
	Time     time.Time `json:"time"`
	Instance string    `json:"instance"`
	Revision string    `json:"revision"`
	Stream   string    `json:"stream"` // "stdout" or "stderr"
	Text     string    `json:"text"`   // without the line end
}

// LogOptions select lines. Empty strings select everything.
type LogOptions struct {
	Service  string
	Revision string
	Instance string
	Tail     int  // at most that many lines of the past of each instance and stream; 0 = none, below 0 = all that is kept
	Follow   bool // go on with what is written from now on
}

// Logs yields the lines in the order in which they were collected, until there are no more, or with Follow until ctx ends.
func (c *Client) Logs(ctx context.Context, ns string, o LogOptions) iter.Seq2[LogLine, error] {
	return func(yield func(LogLine, error) bool) {
		q := url.Values{}
		for name, v := range map[string]string{"service": o.Service, "revision": o.Revision, "instance": o.Instance} {
			if v != "" {
				q.Set(name, v)
			}
		}
		switch { // on the wire 0 is all, which is what leaving it out means, and below 0 is none
		case o.Tail > 0:
			q.Set("tail", strconv.Itoa(o.Tail))
		case o.Tail == 0:
			q.Set("tail", "-1")
		}
		if o.Follow {
			q.Set("follow", "true")
		}
		path := extraPrefix + "/namespaces/" + url.PathEscape(ns) + "/logs"
		resp, err := c.stream(ctx, request{method: http.MethodGet, path: path, query: q, accept: "application/x-ndjson"})
		if err != nil {
			yield(LogLine{}, err)
			return
		}
		defer resp.Body.Close()
		for dec := json.NewDecoder(resp.Body); ; {
			var line LogLine
			if err := dec.Decode(&line); err != nil {
				if !errors.Is(err, io.EOF) {
					yield(LogLine{}, c.explain(ctx, err))
				}
				return
			}
			if !yield(line, nil) {
				return
			}
		}
	}
}

// Upload sends a package, a tar.gz as package bundle makes it, and returns the image that refers to it: pkg://sha256:….
// An upload of the same bytes gives the same image and costs the server nothing more.
func (c *Client) Upload(ctx context.Context, f *os.File) (image string, err error) {
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return "", err
	}
	// No time-out of the usual kind: a large package over a slow line is no error. A NopCloser, because the transport
	// would close the caller's file.
	resp, err := c.stream(ctx, request{
		method: http.MethodPost, path: extraPrefix + "/packages", contentType: "application/gzip",
		body: io.NopCloser(f), size: info.Size(),
	})
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	var answer struct {
		Image string `json:"image"`
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, 1<<20)).Decode(&answer); err != nil {
		return "", fmt.Errorf("read the answer to the upload: %w", err)
	}
	if answer.Image == "" {
		return "", errors.New("the answer to the upload names no image")
	}
	return answer.Image, nil
}

// Scale is what the autoscaler knows of a revision, as the server sends it: a flat JSON object.
type Scale map[string]any

// Scale reads a revision's scale; ErrNotFound if the server has none (no such revision, or an older server).
func (c *Client) Scale(ctx context.Context, ns, revision string) (Scale, error) {
	path := extraPrefix + "/namespaces/" + url.PathEscape(ns) + "/revisions/" + url.PathEscape(revision) + "/scale"
	_, body, err := c.do(ctx, request{method: http.MethodGet, path: path})
	if err != nil {
		return nil, err
	}
	var s Scale
	if err := json.Unmarshal(body, &s); err != nil {
		return nil, fmt.Errorf("read the scale of %s: %w", revision, err)
	}
	return s, nil
}

// Node is one node of a cluster.
type Node struct {
	Name       string `json:"name"`
	Address    string `json:"address,omitempty"`
	State      string `json:"state"`      // ready, silent (it says nothing) or gone
	Scheduling string `json:"scheduling"` // on, cordoned or draining
	Instances  int    `json:"instances"`  // starting and ready
	Draining   int    `json:"draining"`   // finishing the requests inside
	Frozen     int    `json:"frozen"`
}

// Nodes lists the nodes by name; ErrNotFound if the server has none (thaw dev).
func (c *Client) Nodes(ctx context.Context) ([]Node, error) {
	_, body, err := c.do(ctx, request{method: http.MethodGet, path: extraPrefix + "/nodes"})
	if err != nil {
		return nil, err
	}
	var list struct{ Nodes []Node }
	if err := json.Unmarshal(body, &list); err != nil {
		return nil, fmt.Errorf("read the nodes: %w", err)
	}
	return list.Nodes, nil
}

// ScheduleNode says whether instances may be on a node: on, cordoned or draining.
func (c *Client) ScheduleNode(ctx context.Context, name, scheduling string) error {
	body, err := json.Marshal(map[string]string{"scheduling": scheduling})
	if err != nil {
		return err
	}
	_, _, err = c.do(ctx, request{method: http.MethodPut, path: extraPrefix + "/nodes/" + url.PathEscape(name), contentType: "application/json", body: bytes.NewReader(body)})
	return err
}
