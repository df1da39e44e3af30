package verbs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/internal/client"
)

func logsCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	var o client.LogOptions
	var plain, times bool
	cmd := &cobra.Command{
		Use:   "logs NAME",
		Short: "Show what the instances of a service wrote",
		Long: `Logs prints what the instances of a service wrote to standard output and standard error, oldest first, each line with
its revision and instance. Instances that are gone count too, as long as their output is kept.`,
		Example: "  thaw logs hello --tail 20\n  thaw logs hello -f --revision hello-00002",
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if s.output == "yaml" || s.output == "wide" {
				return usage("logs are printed as text or as json, not as %s", s.output)
			}
			if err := s.open(); err != nil {
				return err
			}
			o.Service = args[0]
			return s.logs(cmd.Context(), o, plain, times)
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	f := cmd.Flags()
	f.StringVarP(&s.output, "output", "o", "", "print as json: one object per line")
	f.BoolVarP(&o.Follow, "follow", "f", false, "go on with what is written from now on")
	f.IntVar(&o.Tail, "tail", -1, "only the last N lines of the past, with -f of each instance and stream (-1 = all that is kept)")
	f.StringVar(&o.Revision, "revision", "", "only of this revision")
	f.StringVar(&o.Instance, "instance", "", "only of this instance")
	f.BoolVar(&plain, "plain", false, "the text alone, without revision and instance")
	f.BoolVar(&times, "timestamps", false, "each line with its time")
	return cmd
}

func (s *session) logs(ctx context.Context, o client.LogOptions, plain, times bool) error {
	if _, err := s.service(ctx, o.Service); err != nil {
		return err
	}
	lines := s.client.Logs(ctx, s.namespace, o)
	if o.Tail >= 0 && !o.Follow {
		lines = lastLines(lines, o.Tail)
	}
	n := 0
	enc := json.NewEncoder(s.Stdout)
	for line, err := range lines {
		if err != nil {
			if o.Follow && errors.Is(err, context.Canceled) {
				return nil // this is how following ends
			}
			return err
		}
		n++
		if s.output == "json" {
			if err := enc.Encode(line); err != nil {
				return err
			}
			continue
		}
		head := ""
		if times {
			head = line.Time.Format(time.RFC3339Nano) + " "
		}
		if !plain {
			head += line.Revision + " " + line.Instance + " | "
		}
		if _, err := fmt.Fprintf(s.Stdout, "%s%s\n", head, line.Text); err != nil {
			return err
		}
	}
	if n == 0 && !o.Follow && s.output == "" {
		fmt.Fprintf(s.Stderr, "no output of %s yet\n", o.Service)
	}
	return nil
}

// lastLines keeps the n latest lines over all instances and streams: the server cuts each of these by itself.
func lastLines(lines iter.Seq2[client.LogLine, error], n int) iter.Seq2[client.LogLine, error] {
	return func(yield func(client.LogLine, error) bool) {
		var all []client.LogLine
		for line, err := range lines {
			if err != nil {
				yield(line, err)
				return
			}
			all = append(all, line)
		}
		slices.SortStableFunc(all, func(a, b client.LogLine) int { return a.Time.Compare(b.Time) })
		for _, line := range all[max(0, len(all)-n):] {
			if !yield(line, nil) {
				return
			}
		}
	}
}
