package verbs

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/api"
	"github.com/thawrun/thaw/internal/client"
)

func describeCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	cmd := &cobra.Command{
		Use:     "describe NAME",
		Short:   "Show a service with its revisions, traffic, scale and conditions",
		Example: "  thaw describe hello\n  thaw describe hello -o json",
		Args:    exactArgs("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := s.open(); err != nil {
				return err
			}
			return s.describe(cmd.Context(), args[0])
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	s.outputFlag(cmd, false)
	return cmd
}

func (s *session) describe(ctx context.Context, name string) error {
	svc, err := s.service(ctx, name)
	if err != nil {
		return err
	}
	revisions, err := s.revisions(ctx, name)
	if err != nil {
		return err
	}
	scales := map[string]client.Scale{}
	for _, r := range revisions {
		scale, err := s.client.Scale(ctx, s.namespace, r.Name)
		if errors.Is(err, client.ErrNotFound) {
			continue // idle for long, or a server without an autoscaler
		}
		if st := (*client.StatusError)(nil); errors.As(err, &st) && st.Code == http.StatusServiceUnavailable {
			fmt.Fprintf(s.Stderr, "warning: %v\n", err) // the rest is known
			continue
		}
		if err != nil {
			return err
		}
		scales[r.Name] = scale
	}
	if s.structured() {
		raw, err := s.client.GetRaw(ctx, api.Services, s.namespace, name)
		if err != nil {
			return err
		}
		return s.print(map[string]any{"service": json.RawMessage(raw), "revisions": revisions, "scale": scales})
	}
	return s.printService(svc, revisions, scales)
}

func (s *session) printService(svc *api.Service, revisions []*api.Revision, scales map[string]client.Scale) error {
	w := s.Stdout
	ok, reason := ready(svc.Status.Conditions)
	field := func(name, value string) {
		if value != "" {
			fmt.Fprintf(w, "%-12s %s\n", name+":", cell(value))
		}
	}
	field("Name", svc.Name)
	field("Namespace", svc.Namespace)
	field("URL", svc.Status.URL)
	field("Ready", strings.TrimSpace(ok+" "+reason))
	field("Age", age(svc.CreationTimestamp, s.Now()))
	field("Image", imageOf(svc.Spec.Template.Spec.Containers))
	field("Concurrency", concurrencyText(svc.Spec.Template.Spec.ContainerConcurrency))
	field("Scale", scaleBounds(svc.Spec.Template.Annotations))
	for _, k := range slices.Sorted(maps.Keys(svc.Spec.Template.Annotations)) {
		if strings.HasPrefix(k, api.AutoscalingGroup+"/") || strings.HasPrefix(k, api.InstanceGroup+"/") {
			field("Annotation", k+"="+svc.Spec.Template.Annotations[k])
		}
	}

	fmt.Fprintln(w, "\nTraffic")
	if err := s.printTraffic(svc); err != nil {
		return err
	}
	fmt.Fprintln(w, "\nRevisions")
	rows := make([][]string, 0, len(revisions))
	for _, r := range slices.Backward(revisions) {
		ok, reason := revisionReady(r)
		actual, desired, mode := instances(r, scales[r.Name])
		rows = append(rows, []string{r.Name, ok, actual + "/" + desired + frozen(scales[r.Name]), mode, age(r.CreationTimestamp, s.Now()), imageOf(r.Spec.Containers), reason})
	}
	if err := table(w, []string{"NAME", "READY", "INSTANCES", "MODE", "AGE", "IMAGE", "REASON"}, rows); err != nil {
		return err
	}
	fmt.Fprintln(w, "\nConditions")
	rows = rows[:0]
	for _, c := range svc.Status.Conditions {
		rows = append(rows, []string{c.Type, c.Status, age(&c.LastTransitionTime, s.Now()), c.Reason, c.Message})
	}
	// A revision that failed says why; the service often only that it did.
	for _, r := range revisions {
		for _, c := range r.Status.Conditions {
			if t := trouble(r); t != nil && t.Type == c.Type || c.Status == api.False && c.Severity == api.SeverityError && c.Type != api.ConditionReady {
				rows = append(rows, []string{r.Name + " " + c.Type, c.Status, age(&c.LastTransitionTime, s.Now()), c.Reason, c.Message})
			}
		}
	}
	return table(w, []string{"TYPE", "STATUS", "SINCE", "REASON", "MESSAGE"}, rows)
}

// frozen is what is added to the number of instances: those that do not run but are kept.
func frozen(scale client.Scale) string {
	if n, ok := scale["frozen"].(float64); ok && n > 0 {
		return fmt.Sprintf(" (%g frozen)", n)
	}
	return ""
}

// instances are the columns about a revision's scale: from the autoscaler where it knows the revision, else from the status.
func instances(r *api.Revision, scale client.Scale) (actual, desired, mode string) {
	actual, desired, mode = replicas(r.Status.ActualReplicas), replicas(r.Status.DesiredReplicas), "-"
	text := func(old string, keys ...string) string {
		for _, k := range keys {
			switch v := scale[k].(type) {
			case float64:
				return fmt.Sprintf("%g", v)
			case string:
				if v != "" {
					return strings.ToLower(v)
				}
			}
		}
		return old
	}
	return text(actual, "ready"), text(desired, "desired"), text(mode, "mode")
}
