package reconcile

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/thawrun/thaw/api"
)

// Back-off of a resolution that failed: what is missing today may be there later (a program is being built, a registry is
// away), but nobody is to be bothered all the time.
const (
	firstResolveRetry = time.Second
	lastResolveRetry  = 5 * time.Minute
)

// images remembers the resolutions of images: under way, or ended within this process.
type images struct {
	mu    sync.Mutex
	of    map[api.RevisionID]*resolution
	slots chan struct{} // one for each resolution that may run at once
}

// resolution is one try for all containers of a revision. Guarded by images.mu.
type resolution struct {
	running  bool
	began    time.Time // of the first try
	statuses []api.ContainerStatus
	failure  string // one line for people; empty while there is none
	tries    int
	again    time.Time // no try before this
}

func newImages(n int) images {
	return images{of: map[api.RevisionID]*resolution{}, slots: make(chan struct{}, n)}
}

func (i *images) forget(id api.RevisionID) {
	i.mu.Lock()
	defer i.mu.Unlock()
	delete(i.of, id)
}

// resolved says that the digest of each container is known.
func resolved(rev *api.Revision) bool {
	if len(rev.Status.ContainerStatuses) != len(rev.Spec.Containers) {
		return false
	}
	for _, s := range rev.Status.ContainerStatuses {
		if s.ImageDigest == "" {
			return false
		}
	}
	return true
}

// resolve returns what is known about the revision's images, and starts to find out what is not. The key of the revision
// comes back when there is news.
func (r *Reconcilers) resolve(ctx context.Context, rev *api.Revision) resolution {
	id, now := rev.ID(), r.cfg.Now()
	r.images.mu.Lock()
	defer r.images.mu.Unlock()
	res := r.images.of[id]
	if res == nil {
		res = &resolution{began: now}
		r.images.of[id] = res
	}
	if !res.running && res.statuses == nil {
		if wait := res.again.Sub(now); wait > 0 {
			r.queue.addAfter(revisionKey(id), wait)
		} else {
			res.running = true
			r.background.Go(func() { r.resolveNow(ctx, rev, res) })
		}
	}
	return *res
}

// resolveNow runs the resolver; res is left alone if it was forgotten meanwhile.
func (r *Reconcilers) resolveNow(ctx context.Context, rev *api.Revision, res *resolution) {
	select {
	case r.images.slots <- struct{}{}:
		defer func() { <-r.images.slots }()
	case <-ctx.Done():
		return
	}
	sub, cancel := context.WithTimeoutCause(ctx, r.cfg.ResolveTimeout, fmt.Errorf("no answer within %v", r.cfg.ResolveTimeout))
	defer cancel()
	var statuses []api.ContainerStatus
	failure := ""
	for _, c := range rev.Spec.Containers {
		digest, err := r.resolver.Resolve(sub, c.Image)
		if err == nil && digest == "" {
			err = fmt.Errorf("the digest is empty")
		}
		if err != nil {
			failure = fmt.Sprintf("Unable to fetch image %q: %s", c.Image, err)
			break
		}
		statuses = append(statuses, api.ContainerStatus{Name: c.Name, ImageDigest: digest})
	}
	if ctx.Err() != nil {
		return // we are ending: not the image's fault
	}

	r.images.mu.Lock()
	res.running = false
	if failure == "" {
		res.statuses, res.failure = statuses, ""
	} else {
		res.failure = failure
		res.again = r.cfg.Now().Add(min(firstResolveRetry<<min(res.tries, 16), lastResolveRetry))
		res.tries++
	}
	r.images.mu.Unlock()
	r.queue.add(revisionKey(rev.ID()))
}
