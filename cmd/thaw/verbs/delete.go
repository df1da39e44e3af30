package verbs

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
)

func deleteCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	var files []string
	var wait waitFlags
	var ignore bool
	cmd := &cobra.Command{
		Use:     "delete (NAME... | KIND/NAME... | -f FILE)",
		Aliases: []string{"rm"},
		Short:   "Delete services, or other objects",
		Long: `Delete removes services with all that belongs to them: routes, revisions, instances. KIND/NAME names an object of another
kind, for example revision/hello-00001. It waits until the objects are gone.`,
		Example: "  thaw delete hello\n  thaw delete revision/hello-00001\n  thaw delete -f examples/hello-go/service.yaml",
		RunE: func(cmd *cobra.Command, args []string) error {
			if (len(args) == 0) == (len(files) == 0) {
				return usage("either names or -f FILE must say what to delete")
			}
			var docs []document
			var err error
			if len(files) > 0 {
				docs, err = s.readDocuments(files, cmd.Flags().Changed("namespace"))
			} else {
				docs, err = s.named(args)
			}
			if err != nil {
				return err
			}
			if err := s.open(); err != nil {
				return err
			}
			return s.delete(cmd.Context(), docs, wait, ignore)
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	cmd.Flags().BoolVar(&wait.no, "no-wait", false, "return as soon as the server has accepted it")
	cmd.Flags().DurationVar(&wait.timeout, "wait-timeout", 0, "how long to wait until it is gone (0 = as long as it takes)")
	cmd.Flags().BoolVar(&ignore, "ignore-not-found", false, "what is not there is no error")
	cmd.Flags().StringArrayVarP(&files, "filename", "f", nil, "file, folder, or - for standard input; may be repeated")
	return cmd
}

// named turns NAME and KIND/NAME into documents.
func (s *session) named(args []string) ([]document, error) {
	if len(args) > 1 {
		// As kubectl writes it. Taken as names it would delete services that only have the same name as what was meant.
		if k, err := kindByWord(args[0]); err == nil {
			return nil, usage("%q is a kind: say %s/%s", args[0], k.Singular, args[1])
		}
	}
	var docs []document
	for _, arg := range args {
		d := document{where: arg, kind: api.Services, namespace: s.namespace, name: arg}
		if word, name, ok := strings.Cut(arg, "/"); ok {
			k, err := kindByWord(word)
			if err != nil {
				return nil, err
			}
			d.kind, d.name = k, name
		}
		if d.name == "" {
			return nil, usage("%q names no object", arg)
		}
		docs = append(docs, d)
	}
	return docs, nil
}

// delete goes on after an error, so that one missing name does not leave the others; it returns all errors.
func (s *session) delete(ctx context.Context, docs []document, wait waitFlags, ignore bool) error {
	if wait.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, wait.timeout)
		defer cancel()
	}
	var errs []error
	for _, d := range docs {
		err := s.deleteOne(ctx, d, wait)
		if errors.Is(err, client.ErrNotFound) {
			if ignore {
				continue
			}
			err = fail(fmt.Errorf("no %s %q in namespace %q: %w", d.kind.Singular, d.name, d.namespace, client.ErrNotFound), "thaw list %s -n %s", d.kind.Plural, d.namespace)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		fmt.Fprintf(s.Stdout, "%s/%s deleted\n", d.kind.Singular, d.name)
	}
	if len(errs) == 1 {
		return errs[0]
	}
	return errors.Join(errs...)
}

func (s *session) deleteOne(ctx context.Context, d document, wait waitFlags) error {
	o, err := s.client.Get(ctx, d.kind, d.namespace, d.name)
	if err != nil {
		return err
	}
	if err := s.client.Delete(ctx, d.kind, d.namespace, d.name); errors.Is(err, client.ErrConflict) {
		return fail(err, "delete what uses it first")
	} else if err != nil {
		return err
	}
	if wait.no {
		return nil
	}
	return s.client.WaitGone(ctx, d.kind, d.namespace, d.name, o.Meta().UID)
}
