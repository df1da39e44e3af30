// Package cgroup gives each instance control groups of its own: to end all of it at once, to freeze it, to bound and to measure it,
// as far as the machine lets this process do so (unified tree with controllers, else v1 trees for limits and the unified one for the
// rest, else nothing). Elsewhere than on Linux there are none.
package cgroup

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/thawrun/thaw/instance/provider"
)

// Trees knows where instances get their control groups. Each instance has its own: in the unified tree (v2) whenever
// that may be written, because killing a group reaches even processes that left the session; with limits there if the
// controllers are ours, else in the v1 trees of memory and pids, else without. A nil *Trees has none at all.
type Trees struct {
	unified     string          // folder of the v2 tree below which groups are made; "" = none
	controllers map[string]bool // controllers usable in unified
	v1          map[string]string
	once        sync.Once
	log         *slog.Logger
}

// Controllers are what limits are set with.
var Controllers = []string{"memory", "pids", "cpu"}

const cgroupRoot = "/sys/fs/cgroup"

// New looks at the groups this process is in and prepares one folder for the node in each tree it may write to.
func New(node string, log *slog.Logger) *Trees {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil
	}
	c := &Trees{controllers: map[string]bool{}, v1: map[string]string{}, log: log}
	for line := range strings.Lines(string(own)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		switch {
		case f[0] == "0":
			c.useUnified(f[2], node)
		default:
			for controller := range strings.SplitSeq(f[1], ",") { // "cpu,cpuacct" is one tree
				if dir := filepath.Join(cgroupRoot, controller, f[2], "thaw-"+node); slices.Contains(Controllers, controller) && makeGroup(dir) == nil {
					c.v1[controller] = dir
				}
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
func (c *Trees) useUnified(own, node string) {
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
		for _, name := range Controllers {
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

func (c *Trees) stepDown(here, node string) bool {
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

// unlimited is the name of groups that nobody is ever in.
const unlimited = "unlimited"

// Unlimited returns a folder for each v1 controller that shows what a process without a limit has. It is not the group that such a
// process is in, which has others too: their names are nobody's business. nil = there are no v1 trees.
func (c *Trees) Unlimited() map[string]string {
	if c == nil {
		return nil
	}
	var dirs map[string]string
	for controller, dir := range c.v1 {
		if dir = filepath.Join(dir, unlimited); makeGroup(dir) == nil {
			if dirs == nil {
				dirs = map[string]string{}
			}
			dirs[controller] = dir
		}
	}
	return dirs
}

// Close removes the node's folders, unless instances are still in them.
func (c *Trees) Close() {
	for _, dir := range c.trees() {
		_ = os.Remove(filepath.Join(dir, unlimited))
		_ = os.Remove(dir)
	}
}

func (c *Trees) String() string {
	if c == nil {
		return "no cgroup may be made here, so there are no limits on memory, processes or CPU"
	}
	var has []string
	for _, name := range Controllers {
		switch {
		case c.controllers[name]:
			has = append(has, name+" (cgroup v2)")
		case c.v1[name] != "":
			has = append(has, name+" (cgroup v1)")
		}
	}
	if len(has) == 0 {
		return "own cgroup without controllers, so there are no limits on memory, processes or CPU"
	}
	return "limits on " + strings.Join(has, ", ")
}

// Group is one instance's control groups. A nil *Group has none.
type Group struct {
	trees   *Trees
	id      string
	unified string
	v1      []string // folders that the process is put into after its start
	ahead   string   // folder in the v1 tree of memory, made but not in v1 yet; "" = none
	fd      *os.File // of unified, for the clone
	cpuMax  string   // set by Attach; "" = no limit
}

// Create makes an instance's group, without limits yet.
func (c *Trees) Create(id string) *Group {
	if c == nil {
		return nil
	}
	g := &Group{trees: c, id: id}
	if c.unified != "" {
		dir := filepath.Join(c.unified, id)
		err := os.Mkdir(dir, 0o755)
		if errors.Is(err, os.ErrExist) {
			// Somebody was killed who had a group of that name, frozen perhaps: a child cloned into it would never come to its exec, and we would
			// stand still with it. Nor is one of use that was killed: Linux 6.18 kills whoever is cloned into it later.
			old := Group{trees: c, unified: dir}
			for try := 0; try < 8 && errors.Is(err, os.ErrExist); try++ { // on a busy machine the killed take a while to be gone
				old.Kill()
				old.Remove()
				err = os.Mkdir(dir, 0o755)
			}
		}
		if err == nil {
			g.unified = dir
			g.fd, _ = os.Open(dir)
		}
	}
	// Nearly every instance has a limit on its memory, and of all groups this one takes the kernel longest.
	if tree := c.v1["memory"]; tree != "" && !c.controllers["memory"] {
		if dir := filepath.Join(tree, id); makeGroup(dir) == nil {
			g.ahead = dir
		}
	}
	return g
}

// Limit sets the limits, before the start. One that cannot be set is logged once, not an error: a provider promises isolation
// only as far as the machine allows it, and says so.
func (g *Group) Limit(l provider.Limits) {
	if g == nil {
		return
	}
	if l.Precaution && !g.trees.controllers["memory"] && g.trees.v1["memory"] == "" {
		l.MemoryBytes = 0
	}
	g.limit("memory", "memory.max", "memory.limit_in_bytes", l.MemoryBytes, strconv.FormatInt(l.MemoryBytes, 10))
	g.limit("pids", "pids.max", "pids.max", l.PIDs, strconv.FormatInt(l.PIDs, 10))
	quota := strconv.FormatInt(max(1000, l.CPUMillis*cpuPeriod/1000), 10) // the kernel takes no less than 1 ms
	if g.unified != "" && g.trees.controllers["cpu"] {
		if l.CPUMillis > 0 {
			g.cpuMax = quota + " " + strconv.Itoa(cpuPeriod)
		}
	} else {
		g.limit("cpu", "", "cpu.cfs_quota_us", l.CPUMillis, quota)
	}
	shares := max(2, l.CPURequest*1024/1000)
	g.limit("cpu", "cpu.weight", "cpu.shares", l.CPURequest, g.weight(shares))
	if g.unified != "" && g.trees.controllers["memory"] && l.MemoryBytes > 0 {
		_ = write(g.unified, "memory.swap.max", "0")
		_ = write(g.unified, "memory.oom.group", "1")
	}
}

// weight says a share of the processor in the words of the controller's version. The formula is that of KEP-2254, by which
// Kubernetes and runc map 2..262,144 shares to a weight of 1..10,000.
func (g *Group) weight(shares int64) string {
	if g.unified != "" && g.trees.controllers["cpu"] {
		shares = 1 + (min(shares, 262144)-2)*9999/262142
	}
	return strconv.FormatInt(shares, 10)
}

// cpuPeriod is over what time a CPU limit counts, in microseconds (the kernel's default).
const cpuPeriod = 100_000

func (g *Group) limit(controller, v2file, v1file string, n int64, value string) {
	if n <= 0 {
		return
	}
	c := g.trees
	var err error
	switch {
	case g.unified != "" && c.controllers[controller]:
		err = write(g.unified, v2file, value)
	case c.v1[controller] != "":
		dir := filepath.Join(c.v1[controller], g.id)
		if dir == g.ahead {
			g.ahead = ""
		} else {
			err = makeGroup(dir)
		}
		if err == nil {
			if !slices.Contains(g.v1, dir) {
				g.v1 = append(g.v1, dir)
			}
			err = write(dir, v1file, value)
		}
	default:
		err = errors.ErrUnsupported
	}
	if err != nil {
		c.once.Do(func() { c.log.Warn("a limit cannot be set here", "limit", controller, "instance", g.id, "err", err) })
	}
}

// Late says whether limits can be set on a process that runs already without moving it: where all controllers are in the unified tree.
func (c *Trees) Late() bool {
	if c == nil || c.unified == "" {
		return false
	}
	for _, name := range Controllers {
		if !c.controllers[name] {
			return false
		}
	}
	return true
}

// CloneFD returns the descriptor of the unified group for a clone into it, -1 if there is none.
func (g *Group) CloneFD() int {
	if g == nil || g.fd == nil {
		return -1
	}
	return int(g.fd.Fd())
}

// CloseFD closes it, after the start.
func (g *Group) CloseFD() {
	if g != nil && g.fd != nil {
		g.fd.Close()
		g.fd = nil
	}
}

// Attach puts a started process, and what it has forked meanwhile as far as the unified group knows it, into the v1 groups. A clone
// cannot do that, and doing it before the exec makes every start wait for the kernel: moving a process there takes some
// milliseconds (measured: 3 to 8), whatever else a start costs. So what it allocates before is not counted.
//
// The CPU limit of v2 is set here too: until its exec a thread of ours waits for the child, so it must not be throttled before.
func (g *Group) Attach(pid int) error {
	if g == nil {
		return nil
	}
	if g.cpuMax != "" {
		if err := write(g.unified, "cpu.max", g.cpuMax); err != nil {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	if len(g.v1) == 0 {
		return nil
	}
	inside := map[string][]int{} // moving one that is there already would cost as much
	for _, dir := range g.v1 {
		inside[dir] = processes(dir)
	}
	done := map[int]bool{}
	for range 20 { // a process that forks meanwhile is met in the next round
		pids := []int{pid}
		if g.unified != "" {
			pids = append(pids, processes(g.unified)...)
		}
		news := false
		for _, p := range pids {
			if done[p] {
				continue
			}
			done[p], news = true, true
			for _, dir := range g.v1 {
				if slices.Contains(inside[dir], p) {
					continue
				}
				if err := write(dir, "cgroup.procs", strconv.Itoa(p)); err != nil && !errors.Is(err, syscall.ESRCH) {
					return fmt.Errorf("cgroup: %w", err)
				}
			}
		}
		if !news {
			break
		}
	}
	return nil
}

// Join puts one more process into all the groups.
func (g *Group) Join(pid int) error {
	for _, dir := range g.Paths() {
		if err := write(dir, "cgroup.procs", strconv.Itoa(pid)); err != nil && !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("cgroup: %w", err)
		}
	}
	return nil
}

// processes lists those of one group.
func processes(dir string) (pids []int) {
	b, _ := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	for line := range strings.Lines(string(b)) {
		if pid, err := strconv.Atoi(strings.TrimSpace(line)); err == nil && pid > 1 {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Paths returns all folders of the group.
func (g *Group) Paths() []string {
	if g == nil {
		return nil
	}
	if g.unified == "" {
		return g.v1
	}
	return append([]string{g.unified}, g.v1...)
}

// trees lists the folders that have one group for each instance.
func (c *Trees) trees() []string {
	if c == nil {
		return nil
	}
	var dirs []string
	for _, dir := range []string{c.unified, c.v1["memory"], c.v1["pids"], c.v1["cpu"]} {
		if dir != "" {
			dirs = append(dirs, dir)
		}
	}
	return dirs
}

// Find returns the groups that an instance has.
func (c *Trees) Find(id string) []string {
	var found []string
	for _, tree := range c.trees() {
		dir := filepath.Join(tree, id)
		if _, err := os.Stat(dir); err == nil {
			found = append(found, dir)
		}
	}
	return found
}

// Sweep kills and removes the groups that keep does not name.
func (c *Trees) Sweep(keep func(id string) bool) {
	for _, tree := range c.trees() {
		entries, _ := os.ReadDir(tree)
		for _, e := range entries {
			if e.IsDir() && e.Name() != unlimited && !keep(e.Name()) {
				g := c.Open(e.Name(), []string{filepath.Join(tree, e.Name())})
				g.Kill()
				g.Remove()
			}
		}
	}
}

// Open is the inverse of Paths.
func (c *Trees) Open(id string, paths []string) *Group {
	if c == nil {
		c = &Trees{}
	}
	g := &Group{trees: c, id: id}
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

// Kill ends every process in the group. Where cgroup.kill is missing (v1, or Linux before 5.14), it signals one by one.
func (g *Group) Kill() {
	if g == nil {
		return
	}
	if g.unified != "" && write(g.unified, "cgroup.kill", "1") == nil {
		return
	}
	for _, dir := range g.Paths() {
		for range 10 { // a process that forks meanwhile is met in the next round
			pids := processes(dir)
			if len(pids) == 0 {
				break
			}
			for _, pid := range pids {
				_ = syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	}
}

// OOMKilled says whether the kernel killed a process of the group for want of memory.
func (g *Group) OOMKilled() bool {
	if g == nil {
		return false
	}
	for _, dir := range g.Paths() {
		for _, file := range []string{"memory.events", "memory.oom_control"} {
			if field(filepath.Join(dir, file), "oom_kill") != 0 {
				return true
			}
		}
	}
	return false
}

// Remove deletes the groups. The kernel refuses while a killed process is still being torn down, which takes up to some
// milliseconds; nobody waits for this.
func (g *Group) Remove() {
	if g == nil {
		return
	}
	dirs := g.Paths()
	if g.ahead != "" {
		dirs = append(slices.Clone(dirs), g.ahead)
	}
	for _, dir := range dirs {
		for try := range 8 {
			err := os.Remove(dir)
			if err == nil || errors.Is(err, os.ErrNotExist) {
				break
			}
			time.Sleep(time.Millisecond << try)
		}
	}
}

// Folder returns where the limit of a controller is set and read, "" if it has none.
func (g *Group) Folder(controller string) string {
	if g == nil {
		return ""
	}
	for _, dir := range g.v1 {
		if strings.HasPrefix(dir, g.trees.v1[controller]+"/") && g.trees.v1[controller] != "" {
			return dir
		}
	}
	return ""
}

// Unified returns the folder in the unified tree, "" if there is none.
func (g *Group) Unified() string {
	if g == nil {
		return ""
	}
	return g.unified
}

// Freezes says whether instances can be frozen.
func (c *Trees) Freezes() bool {
	if c == nil || c.unified == "" {
		return false
	}
	dir := filepath.Join(c.unified, "probe")
	if makeGroup(dir) != nil {
		return false
	}
	defer os.Remove(dir)
	_, err := os.Stat(filepath.Join(dir, "cgroup.freeze"))
	return err == nil
}

// Freeze stops every process of the group, or lets them go on. Stopping takes until the last of them has come out of the kernel.
func (g *Group) Freeze(ctx context.Context, frozen bool) error {
	if g == nil || g.unified == "" {
		return provider.ErrUnsupported
	}
	value := "0"
	if frozen {
		value = "1"
	}
	err := write(g.unified, "cgroup.freeze", value)
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ENODEV) { // Linux before 5.2, or the group is gone, or going
		return provider.ErrUnsupported
	}
	if err != nil {
		return fmt.Errorf("freeze: %w", err)
	}
	for wait := 50 * time.Microsecond; frozen && g.event("frozen") != 1; wait = min(2*wait, 5*time.Millisecond) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("freeze: %w", ctx.Err())
		case <-time.After(wait):
		}
	}
	return nil
}

// Frozen says whether the group is frozen or about to be.
func (g *Group) Frozen() bool {
	if g == nil || g.unified == "" {
		return false
	}
	b, err := os.ReadFile(filepath.Join(g.unified, "cgroup.freeze"))
	return err == nil && strings.TrimSpace(string(b)) == "1"
}

// event reads a number of cgroup.events.
func (g *Group) event(name string) int64 {
	return field(filepath.Join(g.unified, "cgroup.events"), name)
}

// field reads the number that stands after a name in a file of lines "name number"; 0 if there is none.
func field(file, name string) int64 {
	b, _ := os.ReadFile(file)
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) == 2 && f[0] == name {
			n, _ := strconv.ParseInt(f[1], 10, 64)
			return n
		}
	}
	return 0
}

// Stats measures the group. Memory is known where the group has a memory limit or a v2 controller.
func (g *Group) Stats() provider.Stats {
	var s provider.Stats
	if g == nil {
		return s
	}
	if g.unified != "" {
		s.CPU = time.Duration(field(filepath.Join(g.unified, "cpu.stat"), "usage_usec")) * time.Microsecond
		s.Throttled = time.Duration(field(filepath.Join(g.unified, "cpu.stat"), "throttled_usec")) * time.Microsecond
		b, _ := os.ReadFile(filepath.Join(g.unified, "cgroup.threads"))
		s.PIDs = bytes.Count(b, []byte{'\n'})
	}
	for _, dir := range g.Paths() {
		for _, file := range []string{"memory.current", "memory.usage_in_bytes"} {
			if b, err := os.ReadFile(filepath.Join(dir, file)); err == nil {
				s.MemoryBytes, _ = strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
			}
		}
		if n := field(filepath.Join(dir, "cpu.stat"), "throttled_time"); n > 0 {
			s.Throttled = time.Duration(n)
		}
	}
	return s
}
