package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/autoscaler/sim"
	"github.com/thawrun/thaw/cmd/thaw/verbs"
)

// newSimulateCommand is `thaw simulate`.
func newSimulateCommand(env *verbs.Env) *cobra.Command {
	var s simulation
	cmd := &cobra.Command{
		Use:   "simulate --trace FILE --policy POLICY",
		Short: "Replay a trace of requests against scaling policies",
		Long: `Plays recorded requests on a virtual clock against a model of the platform, with the decision code that runs live, and prints
what that would have cost and what the requests would have met. A trace is PATH for PATH.json, PATH.functions.csv and
PATH.invocations.csv, or one CSV file with the columns t,requests. Policies: kpa, predictive[:VALUE], keep-alive:DURATION, histogram.`,
		Example: "  thaw simulate --trace traces/az8h-a --policy kpa --policy predictive --policy keep-alive:600s\n" +
			"  thaw simulate --trace load.csv --policy predictive:120 --svg plot.svg",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error { return s.run(cmd.Context(), env) },
	}
	f := cmd.Flags()
	f.StringArrayVar(&s.traces, "trace", nil, "trace to replay; may be repeated")
	f.StringArrayVar(&s.policies, "policy", nil, "policy to try; may be repeated; the first one is what others are compared with (default kpa, predictive)")
	f.StringVarP(&s.output, "output", "o", "", "print as json, with all metrics")
	f.StringVar(&s.svg, "svg", "", "draw load, instances and cold starts over time into this file; one trace and one policy only")
	f.Float64Var(&s.options.StartScale, "start-scale", 1, "multiply all start times by this, 0.001 to 1000")
	f.Uint64Var(&s.options.Seed, "seed", 0, "choose other random arrivals within the slots, service and start times")
	f.BoolVar(&s.oracle, "oracle", false, "compare with somebody who knows the future (vs_oracle)")
	return cmd
}

type simulation struct {
	traces, policies []string
	output, svg      string
	options          sim.Options
	oracle           bool
}

func (s *simulation) run(ctx context.Context, env *verbs.Env) error {
	if err := s.check(); err != nil {
		return &verbs.Failure{Err: err, Next: "thaw simulate --help", Code: verbs.ExitUsage}
	}
	var results []*sim.Result
	for _, name := range s.traces {
		t, err := sim.LoadTrace(name)
		if err != nil {
			return err
		}
		oracle := 0.0
		if s.oracle {
			oracle = sim.Oracle(t, s.options)
		}
		for _, policy := range s.policies {
			p, err := sim.ParsePolicy(policy)
			if err != nil {
				return err
			}
			r, err := sim.Run(ctx, t, p, s.options)
			if err != nil {
				return err
			}
			r.Policy = policy
			if oracle > 0 {
				r.VsOracle = r.InstanceSeconds / oracle
			}
			results = append(results, r)
		}
	}
	if s.svg != "" {
		if err := writeSVG(s.svg, results[0]); err != nil {
			return err
		}
	}
	if s.output == "json" {
		e := json.NewEncoder(env.Stdout)
		e.SetIndent("", "  ")
		return e.Encode(results)
	}
	return s.table(env.Stdout, results)
}

func (s *simulation) check() error {
	if len(s.policies) == 0 {
		s.policies = []string{"kpa", "predictive"}
	}
	for _, p := range s.policies {
		if _, err := sim.ParsePolicy(p); err != nil {
			return err
		}
	}
	s.options.Plot = s.svg != ""
	switch {
	case len(s.traces) == 0:
		return errors.New("no trace: name one with --trace")
	case s.output != "" && s.output != "json":
		return fmt.Errorf("--output %q: only json is known", s.output)
	case s.svg != "" && len(s.traces)*len(s.policies) > 1:
		return errors.New("--svg draws one run: name one --trace and one --policy")
	case !(s.options.StartScale >= 0.001 && s.options.StartScale <= 1000):
		return fmt.Errorf("--start-scale %v: must be in [0.001, 1000]", s.options.StartScale)
	}
	return nil
}

func writeSVG(path string, r *sim.Result) error {
	f, err := os.Create(path)
	if err != nil {
		return fmt.Errorf("write plot: %w", err)
	}
	if err := r.WriteSVG(f); err != nil {
		f.Close()
		return fmt.Errorf("write plot: %w", err)
	}
	return f.Close()
}

// table prints cold rate, cost and waits together: each alone could be bought with the others.
func (s *simulation) table(out io.Writer, results []*sim.Result) error {
	w := tabwriter.NewWriter(out, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintf(w, "trace\tpolicy\trequests\tcold %%\tactive %%\twait %%\tp99 ms\tp99.9 ms\tinstance-s\tx %s\tstarts\tvs oracle\t\n", s.policies[0])
	sums := make([]sim.Result, len(s.policies))
	for i, r := range results {
		first := results[i-i%len(s.policies)]
		row(w, r, first.InstanceSeconds)
		sums[i%len(s.policies)].Add(r)
	}
	if len(s.traces) > 1 {
		for i := range sums {
			sums[i].Trace, sums[i].Policy = "sum", s.policies[i]
			row(w, &sums[i], sums[0].InstanceSeconds)
		}
	}
	return w.Flush()
}

func row(w io.Writer, r *sim.Result, base float64) {
	number := func(v float64, format string) string {
		if v == 0 || math.IsNaN(v) {
			return "-"
		}
		return fmt.Sprintf(format, v)
	}
	fmt.Fprintf(w, "%s\t%s\t%d\t%.3f\t%.3f\t%.2f\t%s\t%s\t%.0f\t%s\t%d\t%s\t\n", r.Trace, r.Policy, r.Requests, r.ColdRate*100, r.ColdRateActive60*100,
		r.WaitRate*100, number(r.WaitP99, "%.0f"), number(r.WaitP999, "%.0f"), r.InstanceSeconds, number(r.InstanceSeconds/base, "%.3f"), r.InstanceStarts,
		number(r.VsOracle, "%.2f"))
}

// newSimCommand is `thaw autoscaler sim`.
func newSimCommand(env *verbs.Env) *cobra.Command {
	policy := "predictive"
	cmd := &cobra.Command{
		Use:   "sim",
		Short: "Decide for an external simulator over standard input and output",
		Long: `Reads messages of the autoscaling simulator's line protocol (docs/simulate.md) from standard input, one JSON object a line, and
answers each with one line on standard output, with the decision code that runs live. Answers depend on nothing but what was read.`,
		Example: "  simulator | thaw autoscaler sim --policy predictive:120",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			p, err := sim.ParsePolicy(policy)
			if err != nil {
				return &verbs.Failure{Err: err, Next: "thaw autoscaler sim --help", Code: verbs.ExitUsage}
			}
			return sim.Serve(env.Stdin, env.Stdout, p)
		},
	}
	cmd.Flags().StringVar(&policy, "policy", policy, "policy that decides: kpa, predictive[:VALUE], keep-alive:DURATION or histogram")
	return cmd
}
