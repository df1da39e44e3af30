package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
	"github.com/thawrun/thaw/netproxy/doctor"
)

// newDoctorCommand is `thaw doctor`: what this machine can do.
func newDoctorCommand(env *verbs.Env) *cobra.Command {
	cmd := &cobra.Command{Use: "doctor", Short: "Find out what this machine can do", Args: cobra.NoArgs}
	var output string
	net := &cobra.Command{
		Use:   "net",
		Short: "What this machine can do for tenants' networks",
		Long: `doctor net tries what tenants' networks need of the kernel, in network namespaces that it makes and throws away: devices, programs,
rules, and each driver of tunnels. It prints what works, which driver is chosen and why not the others, and how long the packets of functions can be
over each device of the machine. It needs root for most of it, and says what it could not try. The exit code is 1 when no driver works.`,
		Example: "  thaw doctor net\n  thaw doctor net -o json",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			self, err := os.Executable()
			if err != nil {
				return err
			}
			r, err := doctor.Examine(self, "version")
			if err != nil {
				return err
			}
			if err := printDoctor(env, output, r); err != nil {
				return err
			}
			if r.Chosen == "" {
				return fmt.Errorf("no driver of tunnels works here")
			}
			return nil
		},
	}
	net.Flags().StringVarP(&output, "output", "o", "", "print as json or yaml")
	cmd.AddCommand(net)
	return cmd
}

func printDoctor(env *verbs.Env, output string, r doctor.Report) error {
	var data []byte
	var err error
	switch output {
	case "":
		return printDoctorText(env, r)
	case "json":
		data, err = json.MarshalIndent(r, "", "  ")
		data = append(data, '\n')
	case "yaml":
		data, err = yaml.Marshal(r)
	default:
		return &verbs.Failure{Err: fmt.Errorf("unknown output format %q; known are json and yaml", output), Code: verbs.ExitUsage}
	}
	if err == nil {
		_, err = env.Stdout.Write(data)
	}
	return err
}

func printDoctorText(env *verbs.Env, r doctor.Report) error {
	w := tabwriter.NewWriter(env.Stdout, 0, 0, 3, ' ', 0)
	tab := func(cells ...any) {
		var line []string
		for _, c := range cells {
			line = append(line, strings.ReplaceAll(fmt.Sprint(c), "\n", "; "))
		}
		fmt.Fprintln(w, strings.Join(line, "\t"))
	}
	tab("FEATURE", "STATE", "FOR", "WHY")
	for _, f := range r.Features {
		tab(f.What, f.State, f.For, f.Why)
	}
	tab()
	tab("DRIVER", "STATE", "OVERHEAD", "WHY")
	for _, d := range r.Drivers {
		why := d.Why
		if d.Name == r.Chosen {
			why = "chosen: the first that works"
		}
		tab(d.Name, d.State, d.Overhead, why)
	}
	tab()
	tab("DEVICE", "MTU", "FUNCTIONS", "MSS")
	for _, p := range r.Paths {
		tab(p.Device, p.MTU, p.Inside, p.MSS)
	}
	return w.Flush()
}
