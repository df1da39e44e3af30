//go:build amd64 || arm64

package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/instance/cgroup"
)

// base is the file system that all sandboxes begin with, as a mount namespace that nobody lives in: a copy of it costs a dozen mounts,
// one of the machine's as many as the machine has. Its root is a small file system in memory; the machine's own root is not in it.
type base struct {
	mnt     *os.File
	folders []string // of the machine that are visible inside
}

// systemFolders are what programs need that were not made to stand alone. They are the machine's, read-only.
var systemFolders = []string{"/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32"}

// systemFiles of /etc tell nothing about the machine that its packages do not.
var systemFiles = []string{
	"/etc/ssl", "/etc/ca-certificates", "/etc/pki", "/etc/alternatives", "/etc/ld.so.cache", "/etc/ld.so.conf", "/etc/ld.so.conf.d",
	"/etc/localtime", "/etc/mime.types", "/etc/services", "/etc/protocols", "/etc/resolv.conf",
}

// devices are those that the OCI runtime specification gives to a container. tty is the terminal of a session, which has none; ptmx
// is a link to that of the sandbox's own pseudo-terminals.
var devices = []string{"null", "zero", "full", "random", "urandom", "tty"}

// newBase makes it. unlimited are folders of control groups by controller, for instances without a limit of that kind to read.
func newBase(cfg Config, unlimited map[string]string) (*base, error) {
	b := &base{}
	root := filepath.Clean(cfg.Dir) // any folder will do: what is mounted there is seen by the child alone
	s := &script{}
	s.do("make mounts private", unix.SYS_MOUNT, nil, "/", nil, unix.MS_REC|unix.MS_PRIVATE, nil)
	s.mount("tmpfs", root, "tmpfs", unix.MS_NOSUID, "mode=755,size=4m,nr_inodes=4096")
	for _, dir := range []string{"proc", "sys", "sys/fs", "sys/fs/cgroup", "dev", "dev/shm", "dev/pts", "etc", "tmp", "run", "var", "root", "home"} {
		s.mkdir(root + "/" + dir)
	}
	s.writableVar(root)
	for _, dir := range append(slices.Clone(systemFolders), cfg.Share...) {
		dir = filepath.Clean(dir)
		if !filepath.IsAbs(dir) || dir == "/" {
			return nil, fmt.Errorf("share %q: an absolute path of a folder is needed", dir)
		}
		if err := s.bind(root, dir); errors.Is(err, os.ErrNotExist) && slices.Contains(systemFolders, dir) {
			continue
		} else if err != nil {
			return nil, err
		}
		b.folders = append(b.folders, dir)
	}
	for _, file := range systemFiles {
		if err := s.bind(root, file); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err
		}
	}
	for _, dev := range devices {
		s.file(root+"/dev/"+dev, "", 0o666)
		s.mount("/dev/"+dev, root+"/dev/"+dev, "", unix.MS_BIND, "")
	}
	for name, target := range map[string]string{"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2", "ptmx": "pts/ptmx"} {
		s.do("symlink", unix.SYS_SYMLINKAT, target, atFDCWD, root+"/dev/"+name)
	}
	for name, content := range map[string]string{
		"passwd":        "root:x:0:0:root:/tmp:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
		"group":         "root:x:0:\nnogroup:x:65534:\n",
		"hosts":         "127.0.0.1 localhost\n::1 localhost\n",
		"nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
	} {
		s.file(root+"/etc/"+name, content, 0o644)
	}
	for controller, dir := range unlimited {
		target := root + "/sys/fs/cgroup/" + controller
		s.mkdir(target)
		s.mount(dir, target, "", unix.MS_BIND, "")
		s.setattr(target, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC, 0)
	}
	s.do("chdir", unix.SYS_CHDIR, root)
	s.do("pivot_root", unix.SYS_PIVOT_ROOT, ".", ".") // the old root lies on top now
	s.do("leave the machine's files", unix.SYS_UMOUNT2, ".", unix.MNT_DETACH)
	h, err := s.hold(unix.CLONE_NEWNS)
	if err != nil {
		return nil, err
	}
	defer h.release()
	b.mnt, err = h.namespace("mnt")
	return b, err
}

func (b *base) close() { b.mnt.Close() }

// writableVar makes the folders of /var that programs write to: both are /tmp.
func (s *script) writableVar(root string) {
	for _, dir := range []string{"/var/tmp", "/var/log"} {
		s.try("symlink "+dir, unix.SYS_SYMLINKAT, "/tmp", atFDCWD, root+dir)
	}
}

// bind makes a file or folder of the machine visible below root, read-only; a symbolic link is copied.
func (s *script) bind(root, file string) error {
	fi, err := os.Lstat(file)
	if err != nil {
		return err
	}
	if fi.Mode()&os.ModeSymlink != 0 && !strings.HasPrefix(file, "/etc/") {
		target, err := os.Readlink(file)
		if err != nil {
			return err
		}
		s.do("symlink "+file, unix.SYS_SYMLINKAT, target, atFDCWD, root+file)
		return nil
	}
	if fi, err = os.Stat(file); err != nil {
		return err
	}
	s.way(root, file, fi.IsDir())
	s.mount(file, root+file, "", unix.MS_BIND|unix.MS_REC, "")
	s.setattr(root+file, unix.MOUNT_ATTR_RDONLY|unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV, unix.AT_RECURSIVE)
	return nil
}

// way makes the folders that lead to file, and file itself, for a mount.
func (s *script) way(root, file string, dir bool) {
	for i, c := range file {
		if c == '/' && i > 0 {
			s.mkdir(root + file[:i])
		}
	}
	if dir {
		s.mkdir(root + file)
	} else {
		s.file(root+file, "", 0o644)
	}
}

// has says whether a file of the machine is visible in every sandbox.
func (b *base) has(file string) bool {
	return slices.ContainsFunc(b.folders, func(dir string) bool { return below(filepath.Clean(file), dir) })
}

// path is what of a PATH is visible inside.
func (b *base) path(agents string) string {
	var inside []string
	for _, dir := range filepath.SplitList(agents) {
		if filepath.IsAbs(dir) && b.has(dir) && !slices.Contains(inside, dir) {
			inside = append(inside, dir)
		}
	}
	if len(inside) == 0 {
		return "/usr/local/bin:/usr/bin:/bin"
	}
	return strings.Join(inside, ":")
}

// ours are folders of the sandbox itself, in which nothing of the machine can be shown.
var ours = []string{"/proc", "/sys", "/dev", "/etc"}

// ownFolder says that a folder is there in every sandbox, as its own.
func ownFolder(dir string) bool {
	return dir == "/" || slices.ContainsFunc(ours, func(o string) bool { return below(dir, o) })
}

// mayShow says whether code can be made visible at its own place.
func (b *base) mayShow(code string) error {
	if code == "" || b.has(code) {
		return nil
	}
	if !filepath.IsAbs(code) || code != filepath.Clean(code) || ownFolder(code) {
		return fmt.Errorf("a sandbox cannot show code at %s; put it into a folder elsewhere, or deploy a package", code)
	}
	return nil
}

// show makes the code of an instance visible at its own place, read-only, and its working directory, as an empty folder, if nothing of
// that is to be seen. The files that it returns are closed by the caller when the script has run.
func (b *base) show(s *script, code []string, dir string, users *os.File) (trees []*os.File, err error) {
	code, made := withoutOwn(code, dir), ""
	if dir = filepath.Clean(dir); filepath.IsAbs(dir) && !ownFolder(dir) && !b.has(dir) && !slices.ContainsFunc(code, func(c string) bool { return below(dir, c) }) {
		made = dir
		code = append(code, made)
	}
	slices.Sort(code)
	var tops []string // folders of the root that are the sandbox's own
	last := ""
	for _, file := range code {
		if err := b.mayShow(file); err != nil {
			return trees, err
		}
		if file == "" || b.has(file) || below(file, last) {
			continue // seen already
		}
		if file != made { // which code may be below
			last = file
		}
		top, deep := topOf(file)
		if deep && top != "/tmp" && !slices.Contains(tops, top) {
			tops = append(tops, top)
			s.mkdir(top)
			// Its other entries are nobody's business, not even their names.
			s.mount("tmpfs", top, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=755,size=64k,nr_inodes=256")
			if top == "/var" {
				s.writableVar("")
			}
		}
		if file == made {
			s.way("", file, true)
			continue
		}
		tree, err := s.showOne(file, users)
		if err != nil {
			return trees, fmt.Errorf("show %s: %w", file, err)
		}
		trees = append(trees, tree)
	}
	for _, top := range tops {
		s.readOnly(top)
	}
	return trees, nil
}

// withoutOwn returns what there is to show: a working directory that every sandbox has is not.
func withoutOwn(code []string, dir string) []string {
	return slices.DeleteFunc(slices.Clone(code), func(c string) bool { return c == filepath.Clean(dir) && ownFolder(c) })
}

// topOf returns the folder of the root that a file is in, and whether it is not that folder itself.
func topOf(file string) (top string, deep bool) {
	top, _, deep = strings.Cut(file[1:], "/")
	return "/" + top, deep
}

// showOne mounts one file or folder. What belongs to the machine's root there belongs to the sandbox's, where the file system can
// do so: people keep programs in folders that are closed to others.
func (s *script) showOne(file string, users *os.File) (*os.File, error) {
	fi, err := os.Stat(file)
	if err != nil {
		return nil, err
	}
	tree, err := cloneTree(file)
	if err != nil {
		return nil, err
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV}
	if err := unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH, &attr); err != nil {
		tree.Close()
		return nil, err
	}
	idmap := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_IDMAP, Userns_fd: uint64(users.Fd())}
	_ = unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH, &idmap)
	s.way("", file, fi.IsDir())
	s.do("show "+file, unix.SYS_MOVE_MOUNT, tree, "", atFDCWD, file, unix.MOVE_MOUNT_F_EMPTY_PATH)
	return tree, nil
}

func cloneTree(file string) (*os.File, error) {
	fd, err := unix.OpenTree(unix.AT_FDCWD, file, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), file), nil
}

// masked are files of /proc that say something about the machine or its memory; readOnlyProc are those that could change it. Users
// of a sandbox may do neither by their rights; this holds should they get some.
var (
	masked       = []string{"/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/latency_stats", "/proc/kmsg", "/proc/kallsyms", "/proc/config.gz"}
	readOnlyProc = []string{"/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/proc/bus", "/proc/fs"}
)

// proc mounts the /proc of the process id namespace that the child is in.
func (s *script) proc() {
	s.mount("proc", "/proc", "proc", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "")
	for _, file := range masked {
		s.try("mask "+file, unix.SYS_MOUNT, "/dev/null", file, nil, unix.MS_BIND, nil)
	}
	for _, file := range readOnlyProc {
		s.try("bind "+file, unix.SYS_MOUNT, file, file, nil, unix.MS_BIND|unix.MS_REC, nil)
		attr := &unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY}
		s.try("read-only "+file, unix.SYS_MOUNT_SETATTR, atFDCWD, file, unix.AT_RECURSIVE, unsafe.Pointer(attr), int(unsafe.Sizeof(*attr)))
	}
}

// showGroups lets an instance read its own limits where programs look for them.
func (pl *place) showGroups(s *script) (files []*os.File, err error) {
	at := map[string]string{}
	for _, controller := range cgroup.Controllers {
		if dir := pl.group.Folder(controller); dir != "" {
			at["/sys/fs/cgroup/"+controller] = dir
		}
	}
	if len(at) == 0 && pl.rt.unlimited == nil && pl.group.Unified() != "" {
		at["/sys/fs/cgroup"] = pl.group.Unified()
	}
	for target, dir := range at {
		tree, err := cloneTree(dir)
		if err != nil {
			return files, fmt.Errorf("show %s: %w", dir, err)
		}
		files = append(files, tree)
		attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC}
		if err := unix.MountSetattr(int(tree.Fd()), "", unix.AT_EMPTY_PATH, &attr); err != nil {
			return files, fmt.Errorf("show %s: %w", dir, err)
		}
		s.mkdir(target)
		s.do("show "+dir, unix.SYS_MOVE_MOUNT, tree, "", atFDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH)
	}
	return files, nil
}
