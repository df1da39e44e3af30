//go:build !linux

package cgroup

import (
	"context"
	"log/slog"

	"github.com/thawrun/thaw/instance/provider"
)

// Trees and Group stand for Linux's control groups, of which there are none here.
type (
	Trees struct{}
	Group struct{}
)

func New(string, *slog.Logger) *Trees             { return nil }
func (*Trees) Close()                             {}
func (*Trees) Create(string) *Group               { return nil }
func (*Trees) Freezes() bool                      { return false }
func (*Trees) Late() bool                         { return false }
func (*Group) Limit(provider.Limits)              {}
func (*Trees) String() string                     { return "no limits on memory, processes or CPU on this system" }
func (*Group) Kill()                              {}
func (*Group) OOMKilled() bool                    { return false }
func (*Group) Remove()                            {}
func (*Group) Stats() (s provider.Stats)          { return s }
func (*Group) Freeze(context.Context, bool) error { return provider.ErrUnsupported }
