package verbs

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
)

func listCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	var all bool
	var selector string
	cmd := &cobra.Command{
		Use:     "list [KIND]",
		Aliases: []string{"ls", "get"},
		Short:   "List services, or objects of another kind",
		Long: `List the services of a namespace, or its revisions, routes, configurations, domain mappings, VPCs, subnets, gateways or elastic IPs.
Kinds can be written in the plural, the singular, or short (ksvc, rev, rt, cfg, dm, sn, gw, eip).`,
		Example: "  thaw list\n  thaw list revisions -l serving.knative.dev/service=hello\n  thaw list -A -o wide",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			kind := api.Services
			if len(args) == 1 {
				var err error
				if kind, err = kindByWord(args[0]); err != nil {
					return err
				}
			}
			if err := s.open(); err != nil {
				return err
			}
			if all {
				s.namespace = ""
			}
			return s.list(cmd.Context(), kind, client.ListOptions{LabelSelector: selector})
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	s.outputFlag(cmd, true)
	cmd.Flags().BoolVarP(&all, "all-namespaces", "A", false, "of all namespaces")
	cmd.Flags().StringVarP(&selector, "selector", "l", "", "only objects with these labels (a=b,c!=d,e)")
	return cmd
}

// kindByWord finds a kind by any of its names.
func kindByWord(word string) (*api.Kind, error) {
	w := strings.ToLower(word)
	var known []string
	for _, k := range api.Kinds {
		if w == k.Plural || w == k.Singular || w == strings.ToLower(k.Kind) || slices.Contains(k.ShortNames, w) {
			return k, nil
		}
		known = append(known, k.Plural)
	}
	if w == "svc" {
		return api.Services, nil
	}
	return nil, usage("unknown kind %q; known are %s", word, strings.Join(known, ", "))
}

func (s *session) list(ctx context.Context, k *api.Kind, o client.ListOptions) error {
	if s.structured() {
		body, err := s.client.ListRaw(ctx, k, s.namespace, o)
		if err != nil {
			return err
		}
		return s.printRaw(body)
	}
	objects, _, err := s.client.List(ctx, k, s.namespace, o)
	if err != nil {
		return err
	}
	if len(objects) == 0 {
		where := "any namespace"
		if s.namespace != "" {
			where = "namespace " + s.namespace
		}
		fmt.Fprintf(s.Stderr, "no %s in %s\n", k.Plural, where)
		if k == api.Services && o.LabelSelector == "" {
			fmt.Fprintln(s.Stderr, "next: thaw deploy hello --dir examples/hello-go")
		}
		return nil
	}
	head, row := s.columns(k)
	rows := make([][]string, 0, len(objects))
	for _, obj := range objects {
		r := row(obj)
		if s.namespace == "" {
			r = append([]string{obj.Meta().Namespace}, r...)
		}
		rows = append(rows, r)
	}
	if s.namespace == "" {
		head = append([]string{"NAMESPACE"}, head...)
	}
	return table(s.Stdout, head, rows)
}

// columns returns the head of a kind's table and the function that makes a row of it.
func (s *session) columns(k *api.Kind) ([]string, func(api.Object) []string) {
	wide := s.output == "wide"
	switch k {
	case api.Services:
		head := []string{"NAME", "URL", "LATEST", "TRAFFIC", "AGE", "READY", "REASON"}
		if wide {
			head = append(head, "CREATED", "CONCURRENCY", "SCALE", "IMAGE")
		}
		return head, func(o api.Object) []string {
			v := o.(*api.Service)
			ok, reason := ready(v.Status.Conditions)
			row := []string{v.Name, v.Status.URL, v.Status.LatestReadyRevisionName, trafficText(v.Status.Traffic), age(v.CreationTimestamp, s.Now()), ok, reason}
			if wide {
				t := v.Spec.Template
				row = append(row, v.Status.LatestCreatedRevisionName, concurrencyText(t.Spec.ContainerConcurrency), scaleBounds(t.Annotations), imageOf(t.Spec.Containers))
			}
			return row
		}
	case api.Revisions:
		head := []string{"NAME", "SERVICE", "GENERATION", "INSTANCES", "AGE", "READY", "REASON"}
		if wide {
			head = append(head, "CONCURRENCY", "SCALE", "IMAGE", "DIGEST")
		}
		return head, func(o api.Object) []string {
			v := o.(*api.Revision)
			ok, reason := revisionReady(v)
			row := []string{v.Name, v.Labels[api.LabelService], v.Labels[api.LabelConfigurationGeneration], replicas(v.Status.ActualReplicas) + "/" + replicas(v.Status.DesiredReplicas), age(v.CreationTimestamp, s.Now()), ok, reason}
			if wide {
				digest := ""
				if len(v.Status.ContainerStatuses) > 0 {
					digest = v.Status.ContainerStatuses[0].ImageDigest
				}
				row = append(row, concurrencyText(v.Spec.ContainerConcurrency), scaleBounds(v.Annotations), imageOf(v.Spec.Containers), digest)
			}
			return row
		}
	case api.Configurations:
		return []string{"NAME", "LATEST", "CREATED", "AGE", "READY", "REASON"}, func(o api.Object) []string {
			v := o.(*api.Configuration)
			ok, reason := ready(v.Status.Conditions)
			return []string{v.Name, v.Status.LatestReadyRevisionName, v.Status.LatestCreatedRevisionName, age(v.CreationTimestamp, s.Now()), ok, reason}
		}
	case api.Routes:
		return []string{"NAME", "URL", "TRAFFIC", "AGE", "READY", "REASON"}, func(o api.Object) []string {
			v := o.(*api.Route)
			ok, reason := ready(v.Status.Conditions)
			return []string{v.Name, v.Status.URL, trafficText(v.Status.Traffic), age(v.CreationTimestamp, s.Now()), ok, reason}
		}
	case api.DomainMappings:
		return []string{"NAME", "URL", "TO", "AGE", "READY", "REASON"}, func(o api.Object) []string {
			v := o.(*api.DomainMapping)
			ok, reason := ready(v.Status.Conditions)
			return []string{v.Name, v.Status.URL, v.Spec.Ref.Name, age(v.CreationTimestamp, s.Now()), ok, reason}
		}
	}
	return s.netColumns(k, wide)
}

func replicas(n *int32) string {
	if n == nil {
		return "-"
	}
	return fmt.Sprint(*n)
}

func concurrencyText(n *int64) string {
	if n == nil || *n == 0 {
		return "unlimited"
	}
	return fmt.Sprint(*n)
}

// scaleBounds is "MIN..MAX" of a template's annotations.
func scaleBounds(annotations map[string]string) string {
	low, ok := api.ScalingAnnotation(annotations, api.ScalingMin)
	if !ok {
		low = "0"
	}
	high, ok := api.ScalingAnnotation(annotations, api.ScalingMax)
	if !ok || high == "0" {
		high = "∞"
	}
	return low + ".." + high
}

func imageOf(containers []api.Container) string {
	if len(containers) == 0 {
		return ""
	}
	return containers[0].Image
}
