package autoscaler

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/endpoints"
)

// TestScripts runs testdata/*.txt: stories of a revision that people can read and write. A script begins with settings:
//
//	config KEY VALUE          a key of config-autoscaler
//	annotation SUFFIX VALUE   under autoscaling.knative.dev/, or a full name
//	limit N                   containerConcurrency (default 10)
//	startup DURATION          from order to ready (default 100ms)
//	new                       the revision was never ready (default: it was)
//
// and goes on with what happens and what is wanted then:
//
//	at T load N               N concurrent requests from T on, reported each second
//	at T demand WAITING RUNNING
//	at T silence | reports    reports stop, or come again
//	at T reserve | active     the last route leaves, or one comes back
//	at T lose N               N ready instances die
//	at T fail DURATION | recover
//	at T found N              N instances are there (after a restart)
//	want [at T] N [WORD...]   desired N, and words of: panic calm proxy serve active activating inactive, ordered=N, ready=N,
//	                          starting=N, ebc=N, activators=N, why=REASONS
//
// Times are since the beginning. Text after # is a comment.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	for _, file := range files {
		t.Run(strings.TrimSuffix(filepath.Base(file), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			s, err := parseScript(string(text))
			if err != nil {
				t.Fatalf("%s: %v", file, err)
			}
			s.run(t, file)
		})
	}
}

// script is a parsed story.
type script struct {
	config      map[string]string
	annotations map[string]string
	limit       int64
	startup     time.Duration
	unhealthy   bool
	lines       []scriptLine
}

type scriptLine struct {
	number int
	at     time.Duration // -1 = where the last line left off
	words  []string
	want   bool
}

func parseScript(text string) (*script, error) {
	s := &script{config: map[string]string{}, annotations: map[string]string{}, limit: 10, startup: 100 * time.Millisecond}
	var errs []error
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		if words := strings.Fields(line); len(words) > 0 {
			if err := s.line(i+1, words); err != nil {
				errs = append(errs, fmt.Errorf("line %d: %w", i+1, err))
			}
		}
	}
	if len(s.lines) == 0 {
		errs = append(errs, errors.New("nothing happens"))
	}
	return s, errors.Join(errs...)
}

func (s *script) line(number int, words []string) (err error) {
	l := scriptLine{number: number, at: -1}
	switch {
	case words[0] == "config" && len(words) == 3:
		s.config[words[1]] = words[2]
		return nil
	case words[0] == "annotation" && len(words) == 3:
		name := words[1]
		if !strings.Contains(name, "/") {
			name = api.AutoscalingGroup + "/" + name
		}
		s.annotations[name] = words[2]
		return nil
	case words[0] == "limit" && len(words) == 2:
		s.limit, err = strconv.ParseInt(words[1], 10, 64)
		return err
	case words[0] == "startup" && len(words) == 2:
		s.startup, err = time.ParseDuration(words[1])
		return err
	case words[0] == "new" && len(words) == 1:
		s.unhealthy = true
		return nil
	case words[0] == "want" && len(words) >= 4 && words[1] == "at":
		l.want, l.words = true, words[3:]
		l.at, err = time.ParseDuration(words[2])
	case words[0] == "want" && len(words) >= 2 && words[1] != "at":
		l.want, l.words = true, words[1:]
	case words[0] == "at" && len(words) >= 3:
		l.words = words[2:]
		l.at, err = time.ParseDuration(words[1])
	default:
		return fmt.Errorf("cannot read %q", strings.Join(words, " "))
	}
	s.lines = append(s.lines, l)
	return err
}

func (s *script) run(t *testing.T, file string) {
	config, err := ParseConfig(s.config)
	if err != nil {
		t.Fatal(err)
	}
	inWorld(t, config, testRevision("r", s.annotations, s.limit), func(w *world) {
		if !s.unhealthy {
			w.rev = healthy(w.rev)
		}
		w.startup = s.startup
		found := false
		for _, l := range s.lines {
			found = found || l.words[0] == "found"
		}
		if !found {
			w.set(w.rev)
		}
		for _, l := range s.lines {
			if l.at >= 0 {
				w.until(l.at)
			}
			if l.want {
				for _, wrong := range check(w.status(), l.words) {
					t.Errorf("%s:%d: at %v: %s", file, l.number, time.Since(w.began), wrong)
				}
				continue
			}
			if err := w.do(l.words); err != nil {
				t.Fatalf("%s:%d: %v", file, l.number, err)
			}
		}
	})
}

// do lets one thing happen.
func (w *world) do(words []string) error {
	numbers := make([]float64, 0, 2)
	var span time.Duration
	for _, word := range words[1:] {
		if n, err := strconv.ParseFloat(word, 64); err == nil {
			numbers = append(numbers, n)
		} else if span, err = time.ParseDuration(word); err != nil {
			return fmt.Errorf("cannot read %q", word)
		}
	}
	switch {
	case words[0] == "load" && len(numbers) == 1:
		w.load = numbers[0]
	case words[0] == "demand" && len(numbers) == 2:
		w.demand(int(numbers[0]), int(numbers[1]))
	case words[0] == "silence":
		w.silent = true
	case words[0] == "reports":
		w.silent = false
	case words[0] == "reserve":
		w.set(reserve(w.rev))
	case words[0] == "active":
		w.set(w.rev)
	case words[0] == "lose" && len(numbers) == 1:
		w.ready = max(0, w.ready-int(numbers[0]))
		w.observe()
	case words[0] == "fail" && span > 0:
		w.failure = &endpoints.Failure{Reason: "ExitCode1", Count: 1, At: time.Now(), Until: time.Now().Add(span)}
		w.starts = nil
		w.observe()
	case words[0] == "recover":
		w.failure = nil
		w.observe()
	case words[0] == "found" && len(numbers) == 1:
		w.ready = int(numbers[0])
		w.desired = w.ready
		w.observe()
		w.set(w.rev)
	default:
		return fmt.Errorf("cannot do %q", strings.Join(words, " "))
	}
	w.wait()
	return nil
}

// check compares a status with what is wanted of it and says what differs.
func check(s Status, words []string) (wrong []string) {
	complain := func(what string, got, want any) {
		wrong = append(wrong, fmt.Sprintf("%s %v, want %v (%+v)", what, got, want, s))
	}
	if n, err := strconv.Atoi(words[0]); err != nil || s.Desired != n {
		complain("desired", s.Desired, words[0])
	}
	for _, word := range words[1:] {
		name, value, number := strings.Cut(word, "=")
		if number {
			got := map[string]string{
				"ordered": strconv.Itoa(s.Ordered), "ready": strconv.Itoa(s.Ready), "starting": strconv.Itoa(s.Starting),
				"ebc": strconv.Itoa(s.ExcessBurstCapacity), "activators": strconv.Itoa(s.Activators), "why": s.Why.String(),
			}[name]
			if got != value {
				complain(name, got, value)
			}
			continue
		}
		switch word {
		case "panic", "calm":
			if s.PanicMode != (word == "panic") {
				complain("panic mode", s.PanicMode, word)
			}
		case "proxy", "serve":
			if s.Mode.String() != word {
				complain("mode", s.Mode, word)
			}
		case "active", "activating", "inactive":
			if s.Activity.String() != word {
				complain("activity", s.Activity, word)
			}
		default:
			complain("cannot read", word, "a word of the format")
		}
	}
	return wrong
}

// FuzzScript keeps the parser of scripts from falling over its input.
func FuzzScript(f *testing.F) {
	f.Add("limit 10\nat 12s load 40\nwant 6 panic\n")
	f.Add("want at 3s 1 # comment")
	f.Fuzz(func(t *testing.T, text string) {
		s, err := parseScript(text)
		if err == nil && len(s.lines) == 0 {
			t.Error("an empty script was taken")
		}
	})
}
