package process

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// cgroups knows where instances get their control groups. Each instance has its own: in the unified tree (v2) whenever
// that may be written, because killing a group reaches even processes that left the session; with limits there if the
// controllers are ours, else in the v1 trees of memory and pids, else without. A nil *cgroups has none at all.
type cgroups struct {
	unified     string          // folder of the v2 tree below which groups are made; "" = none
	controllers map[string]bool // controllers usable in unified
	v1          map[string]string
	once        sync.Once
	log         *slog.Logger
}

const cgroupRoot = "/sys/fs/cgroup"

// newCgroups looks at the groups this process is in and prepares one folder for the node in each tree it may write to.
func newCgroups(node string, log *slog.Logger) *cgroups {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	c := &cgroups{controllers: map[string]bool{}, v1: map[string]string{}, log: log}
	for line := range strings.Lines(string(own)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		switch {
		case f[0] == "0":
			c.useUnified(f[2], node)
		case f[1] == "memory" || f[1] == "pids":
			dir := filepath.Join(cgroupRoot, f[1], f[2], "thaw-"+node)
			if makeGroup(dir) == nil {
				c.v1[f[1]] = dir
			}
		}
	}
	if c.unified == "" && len(c.v1) == 0 {
		return nil
	}
	return c
}

// useUnified prepares the v2 tree. Controllers can be passed down only from a group without processes of its own; when
// this process is alone in its group (a service, a container) it moves one level down to make that so. It never moves
// others, so in a terminal's group there are no limits.
func (c *cgroups) useUnified(own, node string) {
	for _, root := range []string{cgroupRoot, filepath.Join(cgroupRoot, "unified")} {
		here := filepath.Join(root, own)
		if _, err := os.Stat(filepath.Join(here, "cgroup.procs")); err != nil {
			continue
		}
		dir := filepath.Join(here, "thaw-"+node)
		if makeGroup(dir) != nil {
			return
		}
		c.unified = dir
		offered, _ := os.ReadFile(filepath.Join(here, "cgroup.controllers"))
		for _, name := range []string{"memory", "pids"} {
			if !bytes.Contains(append(offered, ' '), []byte(name)) {
				continue
			}
			if enable(here, name) == nil || (c.stepDown(here, node) && enable(here, name) == nil) {
				if enable(dir, name) == nil {
					c.controllers[name] = true
				}
			}
		}
		return
	}
}

func (c *cgroups) stepDown(here, node string) bool {
	procs, err := os.ReadFile(filepath.Join(here, "cgroup.procs"))
	if err != nil || strings.TrimSpace(string(procs)) != strconv.Itoa(os.Getpid()) {
		return false
	}
	self := filepath.Join(here, "thaw-self-"+node)
	return makeGroup(self) == nil && write(self, "cgroup.procs", "0") == nil
}

func enable(dir, controller string) error {
	return write(dir, "cgroup.subtree_control", "+"+controller)
}

func makeGroup(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	return nil
}

func write(dir, file, value string) error {
	return os.WriteFile(filepath.Join(dir, file), []byte(value), 0o644)
}

// close removes the node's folders, unless instances are still in them.
func (c *cgroups) close() {
	for _, dir := range c.trees() {
		_ = os.Remove(dir)
	}
}

func (c *cgroups) String() string {
	if c == nil {
		return "no cgroup may be made here, so there are no limits on memory or processes"
	}
	var has []string
	for _, name := range []string{"memory", "pids"} {
		switch {
		case c.controllers[name]:
			has = append(has, name+" (cgroup v2)")
		case c.v1[name] != "":
			has = append(has, name+" (cgroup v1)")
		}
	}
	if len(has) == 0 {
		return "own cgroup without controllers, so there are no limits on memory or processes"
	}
	return "limits on " + strings.Join(has, " and ")
}

// group is one instance's control groups. A nil *group has none.
type group struct {
	unified string
	v1      []string // folders that the process is put into after its start
	fd      *os.File // of unified, for the clone
}

// create makes the groups and sets the limits. A limit that cannot be set is logged once, not an error: the runtime
// promises isolation only as far as the machine allows it, and says so.
func (c *cgroups) create(id string, l Limits) (*group, error) {
	if c == nil {
		return nil, nil
	}
	g := &group{}
	set := func(controller, v2file, v1file string, n int64) {
		if n <= 0 {
			return
		}
		var err error
		switch {
		case g.unified != "" && c.controllers[controller]:
			err = write(g.unified, v2file, strconv.FormatInt(n, 10))
		case c.v1[controller] != "":
			dir := filepath.Join(c.v1[controller], id)
			if err = makeGroup(dir); err == nil {
				g.v1 = append(g.v1, dir)
				err = write(dir, v1file, strconv.FormatInt(n, 10))
			}
		default:
			err = errors.ErrUnsupported
		}
		if err != nil {
			c.once.Do(func() { c.log.Warn("a limit cannot be set here", "limit", controller, "instance", id, "err", err) })
		}
	}
	if c.unified != "" {
		dir := filepath.Join(c.unified, id)
		if err := makeGroup(dir); err == nil {
			g.unified = dir
			g.fd, _ = os.Open(dir)
		}
	}
	set("memory", "memory.max", "memory.limit_in_bytes", l.MemoryBytes)
	set("pids", "pids.max", "pids.max", l.PIDs)
	if g.unified != "" && c.controllers["memory"] && l.MemoryBytes > 0 {
		_ = write(g.unified, "memory.swap.max", "0")
		_ = write(g.unified, "memory.oom.group", "1")
	}
	return g, nil
}

func (g *group) cloneFD() int {
	if g == nil || g.fd == nil {
		return -1
	}
	return int(g.fd.Fd())
}

func (g *group) closeFD() {
	if g != nil && g.fd != nil {
		g.fd.Close()
		g.fd = nil
	}
}

// attach puts a started process into the v1 groups, which a clone cannot do. What it forked before, within the first
// tenths of a millisecond of its life, stays outside.
func (g *group) attach(pid int) error {
	if g == nil {
		return nil
	}
	var errs []error
	for _, dir := range g.v1 {
		if err := write(dir, "cgroup.procs", strconv.Itoa(pid)); err != nil {
			errs = append(errs, fmt.Errorf("cgroup: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (g *group) paths() []string {
	if g == nil {
		return nil
	}
	if g.unified == "" {
		return g.v1
	}
	return append([]string{g.unified}, g.v1...)
}

// trees lists the folders that have one group for each instance.
func (c *cgroups) trees() []string {
	if c == nil {
		return nil
	}
	var dirs []string
	for _, dir := range []string{c.unified, c.v1["memory"], c.v1["pids"]} {
		if dir != "" {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// find returns the groups that an instance has.
func (c *cgroups) find(id string) []string {
	var found []string
	for _, tree := range c.trees() {
		dir := filepath.Join(tree, id)
		if _, err := os.Stat(dir); err == nil {
			found = append(found, dir)
		}
	}
	return found
}

// sweep kills and removes the groups that keep does not name.
func (c *cgroups) sweep(keep func(id string) bool) {
	for _, tree := range c.trees() {
		entries, _ := os.ReadDir(tree)
		for _, e := range entries {
			if e.IsDir() && !keep(e.Name()) {
				g := openGroup([]string{filepath.Join(tree, e.Name())})
				g.kill()
				g.remove()
			}
		}
	}
}

// openGroup is the inverse of paths.
func openGroup(paths []string) *group {
	g := &group{}
	for _, p := range paths {
		p = filepath.Clean(p)
		if !strings.HasPrefix(p, cgroupRoot+"/") || !strings.Contains(p, "/thaw-") {
			continue // a state file that somebody edited shall not remove folders elsewhere
		}
		if _, err := os.Stat(filepath.Join(p, "cgroup.kill")); err == nil {
			g.unified = p
		} else {
			g.v1 = append(g.v1, p)
		}
	}
	return g
}

// kill ends every process in the group. Where cgroup.kill is missing (v1, or Linux before 5.14), it signals one by one.
func (g *group) kill() {
	if g == nil {
		return
	}
	if g.unified != "" && write(g.unified, "cgroup.kill", "1") == nil {
		return
	}
	for _, dir := range g.paths() {
		for range 10 { // a process that forks meanwhile is met in the next round
			procs, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
			if err != nil || len(procs) == 0 {
				break
			}
			for line := range strings.Lines(string(procs)) {
				if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 1 {
					_ = syscall.Kill(pid, syscall.SIGKILL)
				}
			}
		}
	}
}

// oomKilled says whether the kernel killed a process of the group for want of memory.
func (g *group) oomKilled() bool {
	if g == nil {
		return false
	}
	for _, dir := range g.paths() {
		for _, file := range []string{"memory.events", "memory.oom_control"} {
			b, _ := os.ReadFile(filepath.Join(dir, file))
			for line := range strings.Lines(string(b)) {
				f := strings.Fields(line)
				if len(f) == 2 && f[0] == "oom_kill" && f[1] != "0" {
					return true
				}
			}
		}
	}
	return false
}

// remove deletes the groups. The kernel refuses while a killed process is still being torn down, which takes up to some
// milliseconds; nobody waits for this.
func (g *group) remove() {
	if g == nil {
		return
	}
	for _, dir := range g.paths() {
		for try := range 8 {
			err := os.Remove(dir)
			if err == nil || errors.Is(err, os.ErrNotExist) {
				break
			}
			time.Sleep(time.Millisecond << try)
		}
	}
}
