package dev

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"os"
	"time"

	"sigs.k8s.io/yaml"

	"github.com/thawrun/thaw/autoscaler"
)

func loadScaling(cfg Config) (autoscaler.Config, error) {
	if cfg.Scaling != nil {
		return *cfg.Scaling, cfg.Scaling.Validate()
	}
	return LoadScaling(cfg.Autoscaler)
}

// LoadScaling reads a YAML file with Knative's config-autoscaler keys; "" = the defaults.
func LoadScaling(file string) (autoscaler.Config, error) {
	if file == "" {
		return autoscaler.DefaultConfig(), nil
	}
	b, err := os.ReadFile(file)
	if err != nil {
		return autoscaler.Config{}, fmt.Errorf("autoscaler configuration: %w", err)
	}
	return parseScaling(file, b)
}

func parseScaling(file string, b []byte) (autoscaler.Config, error) {
	// Either the bare map or a ConfigMap around it, as Knative ships it.
	var cm struct {
		Data map[string]string `json:"data"`
	}
	if err := yaml.Unmarshal(b, &cm); err == nil && cm.Data != nil {
		return autoscaler.ParseConfig(cm.Data)
	}
	data := map[string]string{}
	if err := yaml.Unmarshal(b, &data); err != nil {
		return autoscaler.Config{}, fmt.Errorf("autoscaler configuration %s: a map of keys to strings is needed: %w", file, err)
	}
	return autoscaler.ParseConfig(data)
}

// lookEvery is how often the file is looked at: a stat, and a read if that says that it is another one. Polling sees what a watch of the
// folder would miss: files on network folders, and the links that a mounted ConfigMap consists of.
const lookEvery = time.Second

// FollowScaling calls apply with the configuration in file each time that it has changed, until ctx ends. What cannot be read or is
// wrong is said in the log, once, and what was there before stays.
func FollowScaling(ctx context.Context, file string, log *slog.Logger, apply func(autoscaler.Config)) error {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	var seen os.FileInfo
	var known []byte // nil at first: it may have changed since it was loaded
	wrong := ""
	empty := false // it was so at the last look
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		info, err := os.Stat(file)
		if err == nil && seen != nil && os.SameFile(info, seen) && info.ModTime().Equal(seen.ModTime()) && info.Size() == seen.Size() {
			continue
		}
		var b []byte
		if err == nil {
			b, err = os.ReadFile(file)
		}
		if err == nil && len(b) == 0 && !empty { // perhaps somebody is just writing over it
			empty, seen = true, nil
			continue
		}
		empty = err == nil && len(b) == 0
		if err == nil {
			seen = info
			if bytes.Equal(b, known) && wrong == "" {
				continue
			}
		}
		var c autoscaler.Config
		if err == nil {
			c, err = parseScaling(file, b)
		}
		if err != nil {
			if wrong != err.Error() {
				log.Error("autoscaler configuration: what was there before stays", "file", file, "error", err)
			}
			wrong = err.Error()
			continue
		}
		first := known == nil && wrong == ""
		known, wrong = b, ""
		apply(c)
		if !first {
			log.Info("autoscaler configuration: changed", "file", file)
		}
	}
}

func (s *Server) followScaling(ctx context.Context) error {
	if s.cfg.Autoscaler == "" || s.cfg.Scaling != nil {
		<-ctx.Done()
		return nil
	}
	return FollowScaling(ctx, s.cfg.Autoscaler, s.cfg.Log.With("part", "autoscaler"), s.platform.configure)
}
