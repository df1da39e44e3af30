package local

import (
	"bufio"
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
)

// ErrProgram says that a program cannot run on this machine; the error around it says why.
var ErrProgram = errors.New("the program cannot run")

// maxInterpreters is how many scripts in a row may be each other's interpreter, as in the kernel.
const maxInterpreters = 4

// CheckProgram looks whether the kernel would execute a file, and its interpreter, so that a revision that never can run is
// refused with the reason before anything is started. Files are opened with open; path is PATH for `#!/usr/bin/env NAME`.
func CheckProgram(file, path string, open func(string) (*os.File, error)) error {
	for range maxInterpreters + 1 {
		next, err := checkFormat(file, path, open)
		if err != nil {
			return fmt.Errorf("%w: %w", ErrProgram, err)
		}
		if next == "" {
			return nil
		}
		file = next
	}
	return fmt.Errorf("%w: %s: more than %d scripts are each other's interpreter", ErrProgram, file, maxInterpreters)
}

// checkFormat returns the interpreter of a script, "" for a program that the kernel runs by itself.
func checkFormat(file, path string, open func(string) (*os.File, error)) (interpreter string, err error) {
	f, err := open(file)
	if err != nil {
		return "", err
	}
	defer f.Close()
	var head [256]byte // as much as the kernel looks at
	n, err := io.ReadFull(f, head[:])
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return "", fmt.Errorf("%s: %w", file, err) // an empty file included
	}
	if line, ok := bytes.CutPrefix(head[:n], []byte("#!")); ok {
		return checkScript(file, line, path, open)
	}
	if runtime.GOOS != "linux" {
		return "", nil
	}
	return "", checkELF(file, f, open)
}

func checkScript(file string, line []byte, path string, open func(string) (*os.File, error)) (string, error) {
	text, _ := bufio.NewReader(bytes.NewReader(line)).ReadString('\n')
	words := strings.Fields(text)
	if len(words) == 0 {
		return "", fmt.Errorf("%s: its first line names no interpreter", file)
	}
	missing := func(name string, err error) error {
		return fmt.Errorf("%s: its interpreter %q cannot be opened here: %w", file, name, err)
	}
	f, err := open(words[0])
	if err != nil {
		if strings.HasSuffix(text, "\r\n") {
			return "", fmt.Errorf("%s: its first line ends in CR LF, so the kernel looks for %q; save it with LF", file, words[0]+"\r")
		}
		return "", missing(words[0], err)
	}
	f.Close()
	if filepath.Base(words[0]) != "env" || len(words) < 2 || strings.ContainsAny(words[1], "-=") {
		return words[0], nil
	}
	for _, dir := range filepath.SplitList(path) {
		if f, err := open(filepath.Join(dir, words[1])); err == nil {
			f.Close()
			return filepath.Join(dir, words[1]), nil
		}
	}
	return "", missing(words[1], fmt.Errorf("it is not on PATH (%s)", path))
}

// machines are what the kernel of each architecture runs.
var machines = map[string]elf.Machine{
	"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64, "riscv64": elf.EM_RISCV, "s390x": elf.EM_S390, "ppc64le": elf.EM_PPC64,
}

func checkELF(file string, f *os.File, open func(string) (*os.File, error)) error {
	e, err := elf.NewFile(f)
	if err != nil {
		return fmt.Errorf("%s is not a program for this machine, nor a script with a #! line", file)
	}
	if want, ok := machines[runtime.GOARCH]; ok && e.Machine != want && e.Machine != elf.EM_386 {
		return fmt.Errorf("%s is made for %v, this machine is %s: build it for linux/%s", file, e.Machine, runtime.GOARCH, runtime.GOARCH)
	}
	for _, p := range e.Progs {
		if p.Type != elf.PT_INTERP || p.Filesz > 4096 {
			continue
		}
		b := make([]byte, p.Filesz)
		if _, err := p.ReadAt(b, 0); err != nil {
			return fmt.Errorf("%s: %w", file, err)
		}
		loader := string(bytes.TrimRight(b, "\x00"))
		l, err := open(loader)
		if err != nil {
			return fmt.Errorf("%s needs the dynamic loader %s, which cannot be opened here: %w", file, loader, err)
		}
		l.Close()
	}
	return nil
}
