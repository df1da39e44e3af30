//go:build !linux

package main

import "os/exec"

func isolate(*exec.Cmd) {}

func pinSelf() string { return "not pinned: that needs Linux" }

func startPinned(cmd *exec.Cmd) error { return cmd.Start() }
