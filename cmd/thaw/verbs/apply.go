package verbs

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
)

func applyCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	var files []string
	var wait waitFlags
	cmd := &cobra.Command{
		Use:   "apply -f FILE",
		Short: "Create or change objects from YAML or JSON files",
		Long: `Apply makes the objects of files, or merges into those that are there what the files say.
A file may hold several documents. A folder stands for its .yaml, .yml and .json files, "-" for standard input.
All files are read before anything is sent. Afterwards it waits until each object is ready.`,
		Example: "  thaw apply -f examples/hello-go/service.yaml\n  cat *.yaml | thaw apply -f -",
		Args:    exactArgs(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if len(files) == 0 {
				return usage("missing flag: -f FILE")
			}
			docs, err := s.readDocuments(files, cmd.Flags().Changed("namespace"))
			if err != nil {
				return err
			}
			if err := s.open(); err != nil {
				return err
			}
			return s.apply(cmd.Context(), docs, wait)
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	s.outputFlag(cmd, false)
	wait.register(cmd)
	cmd.Flags().StringArrayVarP(&files, "filename", "f", nil, "file, folder, or - for standard input; may be repeated")
	return cmd
}

// apply sends the documents in order and then waits for each. Sending stops at the first error: what comes later may lean
// on what failed.
func (s *session) apply(ctx context.Context, docs []document, wait waitFlags) error {
	type applied struct {
		kind     *api.Kind
		ns, name string
	}
	var done []applied
	var objects []api.Object
	for _, d := range docs {
		o, outcome, err := s.applyOne(ctx, d)
		if err != nil {
			return fmt.Errorf("%s: %w", d.where, err)
		}
		if !s.structured() {
			fmt.Fprintf(s.Stdout, "%s/%s %s\n", d.kind.Singular, o.Meta().Name, outcome)
		}
		done = append(done, applied{d.kind, o.Meta().Namespace, o.Meta().Name})
		objects = append(objects, o)
	}
	if !wait.no {
		for i, a := range done {
			o, err := s.waitReady(ctx, a.kind, a.ns, a.name, wait)
			if err != nil {
				return err
			}
			objects[i] = o
			if v, ok := o.(*api.Service); ok && !s.structured() && v.Status.URL != "" {
				fmt.Fprintf(s.Stdout, "service/%s ready at %s\n", v.Name, v.Status.URL)
			}
		}
	}
	if !s.structured() {
		return nil
	}
	if len(objects) == 1 {
		return s.print(objects[0])
	}
	return s.print(map[string]any{"apiVersion": "v1", "kind": "List", "items": objects})
}

func (s *session) applyOne(ctx context.Context, d document) (api.Object, client.Outcome, error) {
	if d.name != "" {
		return s.client.Apply(ctx, d.kind, d.namespace, d.name, d.data)
	}
	// Only a name to be generated: nothing is there to merge into.
	o, _, err := api.Decode(d.kind, d.data)
	if err != nil {
		return nil, "", err
	}
	o.Meta().Namespace = d.namespace
	o, err = s.client.Create(ctx, d.kind, o)
	return o, client.Created, err
}
