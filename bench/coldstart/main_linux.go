// Command coldstart measures how long it takes from the order to start an instance to the first byte of its first answer, for each provider,
// in three states of preparation (first: nothing is there; pooled: a place waits; frozen: the instance itself waits), for functions
// in Go, Python and Node. In the same run, in alternation, it measures the floor: the same program started with nothing but the
// kernel's calls, plain and with all namespaces the usual way (a second start of this program as init inside). It needs Linux, root
// for the sandboxes, and the Go toolchain; rows whose interpreter is missing are left out. Output: a table in Markdown.
package main

import (
	"bufio"
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/thawrun/thaw/instance/local"
	"github.com/thawrun/thaw/instance/provider"
	"github.com/thawrun/thaw/instance/sandbox"
)

func main() {
	if len(os.Args) > 1 && os.Args[1] == "init" {
		initMain(os.Args[2:])
	}
	n := flag.Int("n", 30, "starts of each row; 0 = none")
	starts := flag.Int("starts", 200, "instances of a new revision that are asked for at once; 0 = none")
	thaws := flag.Int("thaws", 500, "frozen instances that are thawed at once")
	flag.Parse()
	if err := run(*n, *starts, *thaws); err != nil {
		fmt.Fprintln(os.Stderr, "coldstart:", err)
		os.Exit(1)
	}
}

// function is a program to start.
type function struct {
	name string
	argv []string
	code []string
}

// row measures one start.
type row struct {
	name  string
	lang  string
	start func() (time.Duration, error)
	took  []time.Duration
	cpu   time.Duration // of all starts, with their ends
}

func run(n, starts, thaws int) error {
	dir, err := os.MkdirTemp("", "coldstart")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	functions, err := makeFunctions(dir)
	if err != nil {
		return err
	}
	if n > 0 {
		if err := table(dir, functions, n); err != nil {
			return err
		}
	}
	if starts == 0 {
		return nil
	}
	fmt.Println("\n| burst | provider | bare, per second | thaw, per second | thaw / bare |")
	fmt.Println("|---|---|---|---|---|")
	providers := []string{"process"}
	if os.Geteuid() == 0 {
		providers = append(providers, "sandbox")
	}
	for _, p := range providers {
		if err := bursts(dir, functions[0], p, starts, thaws); err != nil {
			return err
		}
	}
	for _, f := range functions[1:] {
		if err := idle(filepath.Join(dir, f.name), f); err != nil {
			return err
		}
	}
	return nil
}

// table measures single starts, all kinds in alternation.
func table(dir string, functions []function, n int) error {
	b := &bench{dir: dir}
	log := slog.New(slog.DiscardHandler)
	node := fmt.Sprintf("coldstart%d", os.Getpid())
	processes, err := local.NewProcesses(node, dir, os.Getenv("PATH"), log)
	if err != nil {
		return err
	}
	defer processes.Close()
	boxes, err := sandbox.New(sandbox.Config{Node: node + "s", Dir: dir, Path: os.Getenv("PATH"), Log: log})
	if err != nil {
		fmt.Fprintln(os.Stderr, "no sandboxes here:", err)
	} else {
		defer boxes.Close()
	}
	var rows []*row
	for _, f := range functions {
		add := func(name string, start func() (time.Duration, error)) {
			rows = append(rows, &row{name: name, lang: f.name, start: start})
		}
		add("floor: fork and exec", func() (time.Duration, error) { return b.bare(f) })
		if boxes != nil {
			add("floor: all namespaces, init inside", func() (time.Duration, error) { return b.bareSandbox(f) })
		}
		for _, p := range []*local.Provider{processes, boxes} {
			if p == nil {
				continue
			}
			name := p.Capabilities().Name
			add(name+", first", func() (time.Duration, error) { return b.first(p, f) })
			add(name+", pooled", func() (time.Duration, error) { return b.pooled(p, f) })
			if p.Capabilities().Freezes {
				frozen, err := b.frozen(p, f)
				if err != nil {
					return fmt.Errorf("%s, frozen, %s: %w", name, f.name, err)
				}
				add(name+", frozen", frozen)
			}
		}
	}
	for i := range n + 2 {
		for _, r := range rows {
			before := cpuTime()
			d, err := r.start()
			if err != nil {
				return fmt.Errorf("%s, %s: %w", r.name, r.lang, err)
			}
			if i >= 2 { // the first two warm caches
				r.took = append(r.took, d)
				r.cpu += cpuTime() - before
			}
		}
	}
	print(rows)
	b.destroyAll()
	return nil
}

func print(rows []*row) {
	floor, cpuFloor := map[string]time.Duration{}, map[string]time.Duration{}
	fmt.Println("| start | function | p50 ms | p90 ms | x floor of its kind | CPU ms | x floor |")
	fmt.Println("|---|---|---|---|---|---|---|")
	for _, r := range rows {
		slices.Sort(r.took)
		p50, p90 := r.took[len(r.took)/2], r.took[len(r.took)*9/10]
		kind := "process"
		if strings.Contains(r.name, "sandbox") || strings.Contains(r.name, "namespaces") {
			kind = "sandbox"
		}
		if strings.HasPrefix(r.name, "floor") {
			floor[r.lang+kind], cpuFloor[r.lang+kind] = p50, r.cpu
		}
		fmt.Printf("| %s | %s | %.2f | %.2f | %.2f | %.2f | %.2f |\n", r.name, r.lang, ms(p50), ms(p90), float64(p50)/float64(floor[r.lang+kind]),
			ms(r.cpu)/float64(len(r.took)), float64(r.cpu)/float64(cpuFloor[r.lang+kind]))
	}
}

// cpuTime is what this process and its children that have ended have used.
func cpuTime() (sum time.Duration) {
	for _, who := range []int{unix.RUSAGE_SELF, unix.RUSAGE_CHILDREN} {
		var u unix.Rusage
		if unix.Getrusage(who, &u) == nil {
			sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
		}
	}
	return sum
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1000 }

// makeFunctions builds the Go sample and finds the interpreters.
func makeFunctions(dir string) ([]function, error) {
	program := filepath.Join(dir, "hello")
	build := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w", "-o", program, "./examples/hello-go")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the sample (run this in the repository): %w: %s", err, out)
	}
	functions := []function{{"Go", []string{program}, []string{program}}}
	for _, i := range []struct{ name, interpreter, folder, file string }{
		{"Python", "/usr/bin/python3", "examples/hello-python", "main.py"},
		{"Node", "/usr/bin/node", "examples/hello-node", "main.js"},
	} {
		folder, err := filepath.Abs(i.folder)
		if err != nil {
			return nil, err
		}
		if _, err := os.Stat(i.interpreter); err != nil {
			fmt.Fprintln(os.Stderr, "left out:", err)
			continue
		}
		functions = append(functions, function{i.name, []string{i.interpreter, filepath.Join(folder, i.file)}, []string{folder}})
	}
	return functions, nil
}

type bench struct {
	dir  string
	made int
	ends []func()
}

func (b *bench) destroyAll() {
	for _, end := range b.ends {
		end()
	}
}

// listen makes the socket that an instance is given.
func listen() (*os.File, string, error) {
	var lc net.ListenConfig
	lc.SetMultipathTCP(false)
	l, err := lc.Listen(context.Background(), "tcp4", "127.0.0.1:0")
	if err != nil {
		return nil, "", err
	}
	defer l.Close()
	f, err := l.(*net.TCPListener).File()
	return f, l.Addr().String(), err
}

// ask sends a request and waits for the answer's first byte.
func ask(addr string) error {
	c, err := net.Dial("tcp4", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	fmt.Fprintf(c, "GET / HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n", addr)
	_, err = bufio.NewReader(c).ReadByte()
	return err
}

// bare starts a program that listens by itself, since nobody tells it its pid, and asks until it answers.
func (b *bench) bare(f function) (time.Duration, error) {
	took, end, err := b.startProcess(f)
	if err == nil {
		end()
	}
	return took, err
}

func (b *bench) startProcess(f function) (took time.Duration, end func(), err error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, nil, err
	}
	addr := l.Addr().String()
	l.Close()
	_, port, _ := net.SplitHostPort(addr)
	null, _ := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	defer null.Close()
	began := time.Now()
	p, err := os.StartProcess(f.argv[0], f.argv, &os.ProcAttr{Env: []string{"PORT=" + port, "PATH=/usr/bin:/bin"}, Files: []*os.File{null, null, null}})
	if err != nil {
		return 0, nil, err
	}
	end = func() { p.Kill(); p.Wait() }
	for {
		if err = ask(addr); err == nil {
			return time.Since(began), end, nil
		}
		if time.Since(began) > 20*time.Second {
			end()
			return 0, nil, err
		}
		ts := unix.NsecToTimespec(200_000)
		unix.Nanosleep(&ts, nil)
	}
}

// bareSandbox starts a program the way that container runtimes do: this program in new namespaces, which mounts, changes the root and
// becomes the function.
func (b *bench) bareSandbox(f function) (time.Duration, error) {
	took, end, err := b.startSandbox(f)
	if err == nil {
		end()
	}
	return took, err
}

func (b *bench) startSandbox(f function) (took time.Duration, end func(), err error) {
	socket, addr, err := listen()
	if err != nil {
		return 0, nil, err
	}
	defer socket.Close()
	root, err := os.MkdirTemp(b.dir, "root")
	if err != nil {
		return 0, nil, err
	}
	began := time.Now()
	cmd := exec.Command("/proc/self/exe", append([]string{"init", root, f.code[0]}, f.argv...)...)
	cmd.Env = []string{"LISTEN_FDS=1", "LISTEN_PID=1", "PATH=/usr/bin:/bin"}
	cmd.ExtraFiles = []*os.File{socket}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS | unix.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{HostID: 0, Size: 1}}, GidMappings: []syscall.SysProcIDMap{{HostID: 0, Size: 1}},
	}
	if err := cmd.Start(); err != nil {
		return 0, nil, err
	}
	end = func() { cmd.Process.Kill(); cmd.Wait(); os.Remove(root) }
	if err := ask(addr); err != nil {
		end()
		return 0, nil, err
	}
	return time.Since(began), end, nil
}

// initMain is the first process of a bare sandbox.
func initMain(args []string) {
	root, code, argv := args[0], args[1], args[2:]
	var errs []error
	do := func(err error) { errs = append(errs, err) }
	bind := func(from string) {
		to := root + from
		if fi, err := os.Stat(from); err == nil && !fi.IsDir() {
			do(os.MkdirAll(filepath.Dir(to), 0o755))
			do(os.WriteFile(to, nil, 0o644))
		} else {
			do(os.MkdirAll(to, 0o755))
		}
		do(unix.Mount(from, to, "", unix.MS_BIND|unix.MS_REC, ""))
		do(unix.Mount("", to, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_REC, ""))
	}
	do(unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""))
	do(unix.Mount("tmpfs", root, "tmpfs", 0, ""))
	bind("/usr")
	for _, link := range []string{"bin", "lib", "lib64"} {
		do(os.Symlink("usr/"+link, root+"/"+link))
	}
	bind(code)
	for _, d := range []string{"/proc", "/tmp", "/dev"} {
		if err := os.MkdirAll(root+d, 0o755); err != nil {
			do(err)
		}
	}
	do(unix.Mount("proc", root+"/proc", "proc", 0, ""))
	if !strings.HasPrefix(code, "/tmp/") {
		do(unix.Mount("tmpfs", root+"/tmp", "tmpfs", 0, ""))
	}
	do(unix.Chdir(root))
	do(unix.PivotRoot(".", "."))
	do(unix.Unmount(".", unix.MNT_DETACH))
	if err := errors.Join(errs...); err == nil {
		do(unix.Exec(argv[0], argv, os.Environ()))
	}
	fmt.Fprintln(os.Stderr, errors.Join(errs...))
	os.Exit(1)
}

// place makes the folder of an instance.
func (b *bench) place() (id string, err error) {
	b.made++
	id = fmt.Sprintf("i%d", b.made)
	dir := filepath.Join(b.dir, id)
	return id, errors.Join(os.Mkdir(dir, 0o755), os.WriteFile(filepath.Join(dir, local.NoteFile), nil, 0o644))
}

// run runs the function in a place that is there and asks it; the caller ends it.
func (b *bench) run(p *local.Provider, f function, id string) (addr string, err error) {
	socket, addr, err := listen()
	if err != nil {
		return "", err
	}
	defer socket.Close()
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return "", err
	}
	defer null.Close()
	err = p.Specialise(context.Background(), id, &provider.Spec{
		Name: "bench-" + id, Path: f.argv[0], Argv: f.argv, Env: []string{"PATH=/usr/bin:/bin"}, Dir: "/", Code: f.code, Stdout: null, Stderr: os.Stderr, Listener: socket,
	})
	if err != nil {
		return "", err
	}
	return addr, ask(addr)
}

func (b *bench) first(p *local.Provider, f function) (time.Duration, error) {
	id, err := b.place()
	if err != nil {
		return 0, err
	}
	defer p.Destroy(context.Background(), id)
	began := time.Now()
	if err := p.Create(context.Background(), id); err != nil {
		return 0, err
	}
	_, err = b.run(p, f, id)
	return time.Since(began), err
}

func (b *bench) pooled(p *local.Provider, f function) (time.Duration, error) {
	id, err := b.place()
	if err != nil {
		return 0, err
	}
	defer p.Destroy(context.Background(), id)
	if err := p.Create(context.Background(), id); err != nil {
		return 0, err
	}
	began := time.Now()
	_, err = b.run(p, f, id)
	return time.Since(began), err
}

// frozen starts one instance, and measures its thaws.
func (b *bench) frozen(p *local.Provider, f function) (func() (time.Duration, error), error) {
	id, err := b.place()
	if err != nil {
		return nil, err
	}
	ctx := context.Background()
	b.ends = append(b.ends, func() { p.Destroy(ctx, id) })
	if err := p.Create(ctx, id); err != nil {
		return nil, err
	}
	addr, err := b.run(p, f, id)
	if err != nil {
		return nil, err
	}
	return func() (time.Duration, error) {
		if err := p.Freeze(ctx, id); err != nil {
			return 0, err
		}
		began := time.Now()
		if err := p.Thaw(ctx, id); err != nil {
			return 0, err
		}
		err := ask(addr)
		return time.Since(began), err
	}, nil
}
