package code

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
	"golang.org/x/sync/singleflight"

	"github.com/thawrun/thaw/instance/store"
)

// PackagesConfig is what a node's packages need.
type PackagesConfig struct {
	Dir    string        // one folder for each package, and one file with the list of what is in it
	Store  store.Store   // where packages are uploaded to and fetched from
	Limits PackageLimits // of one package
	Bytes  int64         // unpacked, beyond which unused packages go, the longest unused first; 0 = 10 GiB
	Log    *slog.Logger  // nil = nothing
}

// Packages are a node's unpacked packages: the first level of the code cache, in front of a store that has them as they were
// uploaded. Each is a read-only folder named after the SHA-256 of the archive, unpacked once, next to its place, and
// then renamed: what has its name is complete. What is not here, or not what it was, is fetched.
type Packages struct {
	root   string
	limits PackageLimits
	far    store.Store
	budget int64
	log    *slog.Logger
	sync   func(dir string) error // writes a folder out to disk
	fill   singleflight.Group

	mu    sync.Mutex
	index *simplelru.LRU[string, *unpacked]
	pins  map[string]int
	stats Stats
}

// unpacked is a package that is here. Guarded by Packages.mu.
type unpacked struct {
	bytes   int64
	checked bool // compared with its list since the process began
	suspect bool // somebody has seen that something changed
}

// Stats are counters since the process began, and the state of now.
type Stats struct {
	Hits    int64 // packages that were here when they were needed
	Misses  int64 // fetched
	Failed  int64 // not to be had
	Corrupt int64 // found changed, and thrown away
	Evicted int64
	Bytes   int64 // unpacked
	Count   int64
	Pinned  int64
}

// Package is what is known of an uploaded package.
type Package struct {
	Image    string `json:"image"`    // pkg://sha256:HEX
	Files    int    `json:"files"`    // files, folders and links
	Bytes    int64  `json:"bytes"`    // unpacked
	Runnable bool   `json:"runnable"` // has an executable "run" at its root; else the container must name a command
	Existed  bool   `json:"existed"`  // was there already
}

const (
	tempPrefix = "tmp-"
	namePrefix = "sha256-"
	listSuffix = ".files"
	// deepBytes is up to which size a package is read and hashed when it is first used; larger ones are only looked at, until
	// Scrub reads them.
	deepBytes    = 1 << 20
	defaultBytes = 10 << 30
	fetchTimeout = 10 * time.Minute
)

// OpenPackages opens a node's packages, makes the folder if need be, and removes what an interrupted process has left.
func OpenPackages(cfg PackagesConfig) (*Packages, error) {
	if err := os.MkdirAll(cfg.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("packages: %w", err)
	}
	abs, err := filepath.Abs(cfg.Dir)
	if err != nil {
		return nil, fmt.Errorf("packages: %w", err)
	}
	if cfg.Bytes <= 0 {
		cfg.Bytes = defaultBytes
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	index, _ := simplelru.NewLRU[string, *unpacked](1<<31-1, nil) // bounded by bytes, below
	p := &Packages{
		root: abs, limits: cfg.Limits.withDefaults(), far: cfg.Store, budget: cfg.Bytes, log: cfg.Log, sync: syncTree,
		index: index, pins: make(map[string]int),
	}
	entries, err := os.ReadDir(abs)
	if err != nil {
		return nil, fmt.Errorf("packages: %w", err)
	}
	for _, e := range entries {
		file := filepath.Join(abs, e.Name())
		sum, ok := strings.CutPrefix(e.Name(), namePrefix)
		if of, isList := strings.CutSuffix(file, listSuffix); isList {
			if _, err := os.Stat(of); err == nil {
				continue
			}
			ok = false // a list without its folder
		}
		if !ok {
			if strings.HasPrefix(e.Name(), tempPrefix) || strings.HasSuffix(file, listSuffix) {
				removeAll(file)
			}
			continue
		}
		m, _ := readManifest(file+listSuffix, false) // one that is missing or broken shows when the package is needed
		p.addLocked(sum, m.Bytes, false)
	}
	return p, nil
}

func (p *Packages) dir(sum string) string { return filepath.Join(p.root, namePrefix+sum) }

// Upload reads an archive (tar, tar.gz, tar.zst or zip) until its end, unpacks it, stores it and returns its name, which is the hash of
// the bytes as they came. ErrBadPackage says that it is not a package; nothing is kept then.
func (p *Packages) Upload(ctx context.Context, r io.Reader) (Package, error) {
	spool, err := os.CreateTemp(p.root, tempPrefix)
	if err != nil {
		return Package{}, fmt.Errorf("packages: %w", err)
	}
	defer os.Remove(spool.Name())
	defer spool.Close()
	h := newHash()
	in := &limitedReader{ctx: ctx, r: r, left: p.limits.ArchiveBytes, what: "archive"}
	if _, err := io.Copy(io.MultiWriter(spool, h), in); err != nil {
		if errors.Is(err, ErrBadPackage) || ctx.Err() != nil {
			return Package{}, err
		}
		return Package{}, fmt.Errorf("packages: the upload broke off: %w", err)
	}
	sum := h.String()
	existed := p.here(sum) && p.load(ctx, sum, false) == nil
	var m manifest
	if existed {
		if m, err = readManifest(p.dir(sum)+listSuffix, false); err != nil {
			return Package{}, fmt.Errorf("packages: %w", err)
		}
	} else if m, err = p.install(spool, sum); err != nil {
		return Package{}, err
	}
	if _, err := spool.Seek(0, io.SeekStart); err != nil {
		return Package{}, fmt.Errorf("packages: %w", err)
	}
	if err := p.far.Put(ctx, sum, spool); err != nil {
		if !existed {
			p.drop(sum)
		}
		return Package{}, err
	}
	return Package{Image: pkgScheme + "sha256:" + sum, Files: m.Files, Bytes: m.Bytes, Runnable: m.Runnable, Existed: existed}, nil
}

// here says whether the package is known, in whatever state.
func (p *Packages) here(sum string) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.index.Contains(sum)
}

// install unpacks an archive whose hash is known and puts the result into its place.
func (p *Packages) install(spool *os.File, sum string) (manifest, error) {
	if _, err := spool.Seek(0, io.SeekStart); err != nil {
		return manifest{}, fmt.Errorf("packages: %w", err)
	}
	temp, err := os.MkdirTemp(p.root, tempPrefix)
	if err != nil {
		return manifest{}, fmt.Errorf("packages: %w", err)
	}
	defer removeAll(temp)
	m, err := unpack(spool, temp, p.limits)
	if err != nil {
		return m, err
	}
	final, list := p.dir(sum), temp+listSuffix
	defer os.Remove(list)
	if err := errors.Join(seal(temp), m.write(list), p.sync(temp)); err != nil {
		return m, fmt.Errorf("packages: %w", err)
	}
	p.mu.Lock()
	if e, ok := p.index.Peek(sum); ok && e.checked && !e.suspect {
		p.mu.Unlock()
		return m, nil // somebody else was faster
	}
	p.remove(sum)
	// The list first: a folder that has its name has its list.
	if err := errors.Join(os.Rename(list, final+listSuffix), os.Rename(temp, final)); err != nil {
		p.mu.Unlock()
		return m, fmt.Errorf("packages: %w", err)
	}
	p.addLocked(sum, m.Bytes, true)
	victims := p.evictLocked(sum)
	p.mu.Unlock()
	for _, v := range victims {
		p.remove(v)
	}
	return m, nil
}

func (p *Packages) addLocked(sum string, bytes int64, checked bool) {
	if old, ok := p.index.Peek(sum); ok {
		p.stats.Bytes -= old.bytes
	}
	p.index.Add(sum, &unpacked{bytes: bytes, checked: checked})
	p.stats.Bytes += bytes
}

// evictLocked takes the longest unused packages that nobody has pinned out of the index, until the rest is within bounds.
func (p *Packages) evictLocked(but string) (victims []string) {
	if p.stats.Bytes <= p.budget {
		return nil
	}
	for _, sum := range p.index.Keys() {
		if p.stats.Bytes <= p.budget {
			break
		}
		if sum == but || p.pins[sum] > 0 {
			continue
		}
		p.forgetLocked(sum)
		p.stats.Evicted++
		victims = append(victims, sum)
	}
	return victims
}

func (p *Packages) forgetLocked(sum string) {
	if e, ok := p.index.Peek(sum); ok {
		p.stats.Bytes -= e.bytes
		p.index.Remove(sum)
	}
}

// drop forgets a package and deletes it.
func (p *Packages) drop(sum string) {
	p.mu.Lock()
	p.forgetLocked(sum)
	p.mu.Unlock()
	p.remove(sum)
}

// remove deletes a package's files. It gives up its name first, so that an interrupted removal leaves no half package.
func (p *Packages) remove(sum string) {
	temp := filepath.Join(p.root, tempPrefix+"gone-"+sum)
	removeAll(temp)
	if err := os.Rename(p.dir(sum), temp); err == nil {
		removeAll(temp)
	}
	_ = os.Remove(p.dir(sum) + listSuffix)
}

// Pin keeps a package from being evicted until as many calls of Unpin. It need not be here.
func (p *Packages) Pin(image string) { p.pin(image, 1) }

// Unpin takes one Pin back.
func (p *Packages) Unpin(image string) { p.pin(image, -1) }

func (p *Packages) pin(image string, n int) {
	m := pkgForm.FindStringSubmatch(image)
	if m == nil {
		return // other forms of code are not ours to keep
	}
	p.mu.Lock()
	if p.pins[m[1]] += n; p.pins[m[1]] <= 0 {
		delete(p.pins, m[1])
	}
	p.mu.Unlock()
}

// Fetch makes sure that a package is here and as it was uploaded, and returns its folder. However many ask for one, it is fetched
// once; one who leaves does not end it for the others.
func (p *Packages) Fetch(ctx context.Context, sum string) (string, error) {
	p.mu.Lock()
	e, ok := p.index.Get(sum)
	if ok = ok && e.checked && !e.suspect; ok {
		p.stats.Hits++
	}
	p.mu.Unlock()
	dir := p.dir(sum)
	if ok {
		if _, err := os.Stat(dir); err == nil {
			return dir, nil
		}
	}
	done := p.fill.DoChan(sum, func() (any, error) {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), fetchTimeout)
		defer cancel()
		return nil, p.load(ctx, sum, true)
	})
	select {
	case res := <-done:
		return dir, res.Err
	case <-ctx.Done():
		return "", ctx.Err()
	}
}

// load compares a package with its list. If it is not here or has changed, it is fetched, or else an error.
func (p *Packages) load(ctx context.Context, sum string, fetch bool) error {
	p.mu.Lock()
	e, ok := p.index.Peek(sum)
	deep := ok && (e.suspect || e.bytes <= deepBytes)
	p.mu.Unlock()
	if ok {
		err := p.check(ctx, sum, deep)
		if err == nil {
			if fetch {
				p.count(func(s *Stats) { s.Hits++ })
			}
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		p.log.Warn("package has changed on disk: fetching it again", "package", sum, "err", err)
		p.count(func(s *Stats) { s.Corrupt++ })
		p.drop(sum)
	}
	if !fetch {
		return notHere(sum, nil)
	}
	if err := p.fetch(ctx, sum); err != nil {
		p.count(func(s *Stats) { s.Failed++ })
		return err
	}
	p.count(func(s *Stats) { s.Misses++ })
	return nil
}

func (p *Packages) count(f func(*Stats)) {
	p.mu.Lock()
	f(&p.stats)
	p.mu.Unlock()
}

func notHere(sum string, err error) error {
	if err == nil {
		return fmt.Errorf("%w: no package sha256:%s here; upload it again with thaw deploy --dir", ErrNotFound, sum)
	}
	return fmt.Errorf("%w: no package sha256:%s here; upload it again with thaw deploy --dir: %w", ErrNotFound, sum, err)
}

// check compares what is on disk with the list.
func (p *Packages) check(ctx context.Context, sum string, deep bool) error {
	m, err := readManifest(p.dir(sum)+listSuffix, true)
	if err != nil {
		return err
	}
	if err := m.compare(ctx, p.dir(sum), deep); err != nil {
		return err
	}
	p.mu.Lock()
	if e, ok := p.index.Peek(sum); ok {
		e.checked, e.suspect = true, false
	}
	p.mu.Unlock()
	return nil
}

// suspect makes the next Fetch read the whole package.
func (p *Packages) suspect(sum string) {
	p.mu.Lock()
	if e, ok := p.index.Peek(sum); ok {
		e.suspect = true
	}
	p.mu.Unlock()
}

// fetch takes a package from the store. Nothing of it is unpacked before all of it is known to be right; if the store's own copy
// is not, it is told so once, and asked again.
func (p *Packages) fetch(ctx context.Context, sum string) error {
	err := p.fetchOnce(ctx, sum)
	if errors.Is(err, store.ErrCorrupt) {
		p.log.Warn("the store's copy of a package is corrupt", "package", sum, "err", err)
		_ = p.far.Verify(ctx, sum)
		err = p.fetchOnce(ctx, sum)
	}
	if errors.Is(err, store.ErrNotFound) {
		return notHere(sum, err)
	}
	return err
}

func (p *Packages) fetchOnce(ctx context.Context, sum string) error {
	r, err := store.Resume(ctx, p.far, sum)
	if err != nil {
		return err
	}
	defer r.Close()
	spool, err := os.CreateTemp(p.root, tempPrefix)
	if err != nil {
		return fmt.Errorf("packages: %w", err)
	}
	defer os.Remove(spool.Name())
	defer spool.Close()
	h := newHash()
	if _, err := io.Copy(io.MultiWriter(spool, h), &limitedReader{ctx: ctx, r: r, left: p.limits.ArchiveBytes, what: "archive"}); err != nil {
		return err
	}
	if got := h.String(); got != sum {
		return fmt.Errorf("%w: the bytes of sha256:%s have the hash %s", store.ErrCorrupt, sum, got)
	}
	_, err = p.install(spool, sum)
	return err
}

// Scrub reads all packages again and again, each once in every period, evenly spread, until ctx ends. What has changed is fetched.
func (p *Packages) Scrub(ctx context.Context, period time.Duration) {
	for {
		p.mu.Lock()
		sums := p.index.Keys()
		p.mu.Unlock()
		pause := period / time.Duration(len(sums)+1)
		for _, sum := range append(sums, "") {
			select {
			case <-ctx.Done():
				return
			case <-time.After(pause):
			}
			if sum == "" || !p.here(sum) {
				continue
			}
			p.suspect(sum)
			if _, err := p.Fetch(ctx, sum); err != nil && ctx.Err() == nil {
				p.log.Warn("package is lost", "package", sum, "err", err)
			}
		}
	}
}

// Stats returns the counters.
func (p *Packages) Stats() Stats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Count, s.Pinned = int64(p.index.Len()), int64(len(p.pins))
	return s
}

// Sweep removes from the store, and from here, what was stored before a time and is not used. It returns how many packages went.
func (p *Packages) Sweep(ctx context.Context, before time.Time, used func(image string) bool) (n int, err error) {
	for e, err := range p.far.List(ctx) {
		if err != nil {
			return n, err
		}
		if e.Stored.After(before) || used(pkgScheme+"sha256:"+e.Sum) {
			continue
		}
		if err := p.far.Remove(ctx, e.Sum); err != nil {
			return n, err
		}
		p.drop(e.Sum)
		n++
	}
	return n, nil
}

// seal makes everything below dir read-only.
func seal(dir string) error {
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case name == dir:
			return nil // the folder itself can be renamed only while it may be written
		case d.IsDir():
			return os.Chmod(name, 0o555)
		case d.Type().IsRegular():
			fi, err := d.Info()
			if err != nil {
				return err
			}
			mode := fs.FileMode(0o444)
			if fi.Mode()&0o111 != 0 {
				mode = 0o555
			}
			return os.Chmod(name, mode)
		}
		return nil
	})
	return errors.Join(err, os.Chmod(dir, 0o755))
}

// removeAll also deletes folders that were made read-only.
func removeAll(dir string) {
	_ = filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			_ = os.Chmod(name, 0o755)
		}
		return nil
	})
	_ = os.RemoveAll(dir)
}
