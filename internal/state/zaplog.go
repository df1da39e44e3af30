package state

import (
	"context"
	"log/slog"
	"sync/atomic"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// zapTo makes etcd's logger write to log. What etcd calls info is debug here: its start alone says forty things. While quiet is
// set everything is debug: a normal start and end have their warnings and errors. fatal (nil: zap's
// own) is what follows a message after which etcd would end the process.
func zapTo(log *slog.Logger, quiet *atomic.Bool, fatal zapcore.CheckWriteHook) *zap.Logger {
	options := []zap.Option{}
	if fatal != nil {
		options = append(options, zap.WithFatalHook(fatal), zap.WithPanicHook(fatal))
	}
	return zap.New(&zapCore{log: log, quiet: quiet}, options...)
}

// zapCore is the zapcore.Core over slog.
type zapCore struct {
	log   *slog.Logger
	quiet *atomic.Bool // may be nil
}

// earlyNoise tells what a healthy new server complains of in its first second, before its first term is on disk; it tries again.
func earlyNoise(message string) bool {
	return message == "failed to update storage version" || message == "Failed to detect schema version"
}

func (c *zapCore) level(l zapcore.Level, message string) slog.Level {
	switch {
	case c.quiet != nil && c.quiet.Load(), l < zapcore.WarnLevel, earlyNoise(message):
		return slog.LevelDebug
	case l == zapcore.WarnLevel:
		return slog.LevelWarn
	}
	return slog.LevelError
}

func (c *zapCore) Enabled(l zapcore.Level) bool {
	return l > zapcore.DebugLevel && c.log.Enabled(context.Background(), c.level(l, ""))
}

func (c *zapCore) With(fields []zapcore.Field) zapcore.Core {
	return &zapCore{log: c.log.With(attributes(fields)...), quiet: c.quiet}
}

// Check takes fatal messages even when nobody reads them: zap runs the hook only for messages that were taken.
func (c *zapCore) Check(e zapcore.Entry, ce *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if c.Enabled(e.Level) || e.Level >= zapcore.DPanicLevel {
		return ce.AddCore(e, c)
	}
	return ce
}

func (c *zapCore) Write(e zapcore.Entry, fields []zapcore.Field) error {
	c.log.Log(context.Background(), c.level(e.Level, e.Message), "etcd: "+e.Message, attributes(fields)...)
	return nil
}

func (c *zapCore) Sync() error { return nil }

// attributes turns zap's fields into slog's.
func attributes(fields []zapcore.Field) []any {
	enc := zapcore.NewMapObjectEncoder()
	attrs := make([]any, 0, len(fields))
	for _, f := range fields {
		f.AddTo(enc)
		attrs = append(attrs, slog.Any(f.Key, enc.Fields[f.Key]))
	}
	return attrs
}
