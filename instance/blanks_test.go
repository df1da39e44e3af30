package instance

import (
	"bytes"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/bundle"
	"github.com/thawrun/thaw/internal/endpoints"
)

// interpreted are functions that say what they see of their process.
var interpreted = map[string]struct{ file, text string }{
	"python": {"function.py", `
import os, socket, sys
import helper
def pipe(fd):
    try:
        return os.readlink("/proc/self/fd/" + fd).startswith("pipe:")
    except OSError:
        return False  # the folder's own
def handle(request):
    return "\n".join([os.getcwd(), " ".join(sys.argv), os.environ["GREETING"], os.environ["K_REVISION"], os.environ["THAW_INSTANCE"],
        helper.word, str(os.getpid()), os.environ["TMPDIR"], socket.gethostname(), str(len(list(filter(pipe, os.listdir("/proc/self/fd")))))]) + "\n"
`},
	"node": {"function.js", `
const fs = require('fs'), helper = require('./helper.js');
const pipe = (fd) => { try { return fs.readlinkSync('/proc/self/fd/' + fd).startsWith('pipe:'); } catch { return false; } };
exports.handle = () => [process.cwd(), process.argv.slice(1).join(' '), process.env.GREETING, process.env.K_REVISION, process.env.THAW_INSTANCE,
  helper.word, process.pid, process.env.TMPDIR, require('os').hostname(), fs.readdirSync("/proc/self/fd").filter(pipe).length].join('\n') + '\n';
`},
}

// deployed uploads an interpreted function and makes a revision of it.
func deployed(t *testing.T, a *Agent, language, name string, change func(*api.Container)) *api.Revision {
	t.Helper()
	if _, err := exec.LookPath(bundle.Interpreter(language)); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	f := interpreted[language]
	helper := map[string]string{"python": "word = 'helped'\n", "node": "exports.word = 'helped';\n"}[language]
	for file, text := range map[string]string{f.file: f.text, "helper" + filepath.Ext(f.file): helper} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var archive bytes.Buffer
	if _, err := bundle.Create(t.Context(), dir, &archive, io.Discard); err != nil {
		t.Fatal(err)
	}
	p, err := a.Upload(t.Context(), &archive)
	if err != nil {
		t.Fatal(err)
	}
	rev := revisionOf(t, name, "", "GREETING=hello $(K_REVISION)")
	c := &rev.Spec.Containers[0]
	c.Image, c.Args = p.Image, []string{"one", "two"}
	if change != nil {
		change(c)
	}
	return rev
}

func (r *rig) blanksReady(language string, n int) {
	r.t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		r.blanks.mu.Lock()
		got := len(r.blanks.ready[language])
		r.blanks.mu.Unlock()
		if got == n {
			return
		}
		if time.Now().After(deadline) {
			r.t.Fatalf("%d blanks of %s, want %d", got, language, n)
		}
	}
}

// TestBlankBecomesWhatAStartMakes starts each function once the usual way and once from a blank: it must not see a difference.
func TestBlankBecomesWhatAStartMakes(t *testing.T) {
	eachProvider(t, func(t *testing.T, use func(*Config)) {
		for language := range interpreted {
			r := newRig(t, func(c *Config) { use(c); c.FrozenFor = 0 })
			// The first one is asked for before there can be a blank: with an own PATH there is none.
			slow := deployed(t, r.Agent, language, "fn-00001", func(c *api.Container) { c.Env = append(c.Env, api.EnvVar{Name: "LC_ALL", Value: "C.UTF-8"}) })
			r.SetRevision(slow)
			r.Scale(slow.ID(), 1, time.Now())
			usual := r.ready(slow.ID(), 1).Instances[0]
			said := []string{get(t, usual.Addr, "/"), ""}
			r.blanksReady(language, 0)

			fast := deployed(t, r.Agent, language, "fn-00002", nil)
			r.SetRevision(fast)
			r.blanksReady(language, blanksAhead)
			r.Scale(fast.ID(), 1, time.Now())
			in := r.ready(fast.ID(), 1).Instances[0]
			said[1] = get(t, in.Addr, "/")
			if r.blanks.used != 1 {
				t.Fatalf("%s: %d blanks were used", language, r.blanks.used)
			}
			for i, at := range []endpoints.Instance{usual, in} { // what has to differ
				own := strings.NewReplacer(at.ID, "ID", string(slow.Name), "REV", string(fast.Name), "REV", folderOf(at.ID), "FOLDER")
				lines := strings.Split(own.Replace(said[i]), "\n")
				if len(lines) < 10 {
					t.Fatalf("%s says %q", language, said[i])
				}
				if r.caps.OwnFiles {
					if lines[6] != "1" {
						t.Errorf("%s: process %s", language, lines[6])
					}
				}
				lines[6] = "PID"
				said[i] = strings.Join(lines, "\n")
			}
			if said[0] != said[1] {
				t.Errorf("%s, started:\n%s\nfrom a blank:\n%s", language, said[0], said[1])
			}
			st := in.Start
			if st.Exec.IsZero() || st.Ready.Before(st.Exec) || st.Code.After(st.Exec) {
				t.Errorf("times of a start from a blank: %+v", st)
			}
			r.blanksReady(language, blanksAhead) // it is replaced
			r.RemoveRevision(fast.ID())
			r.ready(fast.ID(), 0)
			r.blanksReady(language, 0) // no revision needs them
			r.stop()
		}
	})
}

// TestBlanksOfAKilledAgentEnd kills an agent whose blanks wait.
func TestBlanksOfAKilledAgentEnd(t *testing.T) {
	eachProvider(t, func(t *testing.T, use func(*Config)) {
		dir := t.TempDir()
		r := newRigIn(t, dir, use)
		rev := deployed(t, r.Agent, "python", "fn-00001", nil)
		r.stop()

		var c Config
		use(&c)
		t.Setenv("AGENT_PROVIDER", c.Provider)
		first := startAgentProcess(t, dir)
		first.in.Encode(order{rev, rev.ID(), 1})
		in := first.ready(rev.ID(), 1).Instances[0]
		folders := func() []string {
			all, _ := os.ReadDir(filepath.Join(dir, "instances"))
			var of []string
			for _, e := range all {
				if b, _ := os.ReadFile(filepath.Join(dir, "instances", e.Name(), "process.json")); len(b) > 0 && e.Name() != folderOf(in.ID) {
					of = append(of, e.Name())
				}
			}
			return of
		}
		for deadline := time.Now().Add(20 * time.Second); len(folders()) == 0; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("no blank is started")
			}
		}
		blanks := folders()
		first.kill()
		second := newRigIn(t, dir, use)
		second.SetRevision(rev)
		if s := second.ready(rev.ID(), 1); !s.Instances[0].Adopted {
			t.Errorf("%+v is not adopted", s.Instances[0])
		}
		for _, folder := range blanks {
			if _, err := os.Stat(filepath.Join(dir, "instances", folder)); err == nil {
				t.Errorf("the folder of blank %s is left", folder)
			}
		}
		second.stop()
	})
}

// TestBlankIsNotForEverybody: what an interpreter looks at when it starts, and what cannot be changed later, needs a start.
func TestBlankIsNotForEverybody(t *testing.T) {
	r := newRig(t, nil)
	for what, change := range map[string]func(*api.Container){
		"PYTHONPATH": func(c *api.Container) { c.Env = append(c.Env, api.EnvVar{Name: "PYTHONPATH", Value: "/x"}) },
		"PATH":       func(c *api.Container) { c.Env = append(c.Env, api.EnvVar{Name: "PATH", Value: "/bin"}) },
		"LD_PRELOAD": func(c *api.Container) { c.Env = append(c.Env, api.EnvVar{Name: "LD_PRELOAD", Value: "x.so"}) },
		"command":    func(c *api.Container) { c.Command = []string{"./run"} },
		"user":       func(c *api.Container) { c.SecurityContext = []byte(`{"runAsUser": 1000}`) },
	} {
		if p := r.newPlan(deployed(t, r.Agent, "python", "fn-00001", change)); p.language != "" || p.err != nil {
			t.Errorf("%s: a blank of %q, %v", what, p.language, p.err)
		}
	}
	if p := r.newPlan(deployed(t, r.Agent, "python", "fn-00001", nil)); p.language != "python" {
		t.Errorf("no blank for the plain function: %q, %v", p.language, p.err)
	}
	if p := r.newPlan(revisionOf(t, "go-00001", "ok")); p.language != "" {
		t.Errorf("a blank of %q for a program", p.language)
	}
}

// TestDeadBlankIsNotUsed kills those that wait.
func TestDeadBlankIsNotUsed(t *testing.T) {
	r := newRig(t, nil)
	rev := deployed(t, r.Agent, "python", "fn-00001", nil)
	r.SetRevision(rev)
	r.blanksReady("python", blanksAhead)
	r.blanks.mu.Lock()
	dead := append([]*blank(nil), r.blanks.ready["python"]...)
	r.blanks.mu.Unlock()
	for _, x := range dead {
		if err := r.provider.Stop(t.Context(), x.name); err != nil {
			t.Fatal(err)
		}
		<-x.prog.done
	}
	r.Scale(rev.ID(), 1, time.Now())
	if s := r.ready(rev.ID(), 1); s.Failure != nil {
		t.Errorf("%+v", s.Failure)
	}
}

// TestBlanksThatCannotBeMade: the function starts the usual way, and the agent goes on.
func TestBlanksThatCannotBeMade(t *testing.T) {
	r := newRig(t, nil)
	if err := os.WriteFile(filepath.Join(r.dir, "bootstrap"), nil, 0o644); err != nil { // where its folder should be
		t.Fatal(err)
	}
	rev := deployed(t, r.Agent, "python", "fn-00001", nil)
	r.SetRevision(rev)
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		r.blanks.mu.Lock()
		at := r.blanks.failed["python"]
		r.blanks.mu.Unlock()
		if !at.IsZero() {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("no failure is noted")
		}
	}
	r.Scale(rev.ID(), 1, time.Now())
	if s := r.ready(rev.ID(), 1); s.Failure != nil {
		t.Errorf("%+v", s.Failure)
	}
}
