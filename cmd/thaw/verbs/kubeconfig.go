package verbs

import (
	"encoding/base64"
	"fmt"
	"net/url"
	"os"
	"runtime"

	"github.com/spf13/cobra"
	"sigs.k8s.io/yaml"
)

func kubeconfigCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	cmd := &cobra.Command{
		Use:   "kubeconfig",
		Short: "Print a file that makes kn and kubectl talk to this server",
		Long: `Kubeconfig prints a kubeconfig on standard output. Over plain http the token stands in the server's address, because
clients do not send bearer tokens without TLS; over https the file has the token and the certificate authority.
Whoever can read the file can use the server.`,
		Example: "  thaw kubeconfig > ~/.thaw/kubeconfig && export KUBECONFIG=~/.thaw/kubeconfig\n  kn service list",
		Args:    exactArgs(),
		RunE: func(*cobra.Command, []string) error {
			if err := s.open(); err != nil {
				return err
			}
			config, err := s.kubeconfig()
			if err != nil {
				return err
			}
			out, err := yaml.Marshal(config)
			if err != nil {
				return err
			}
			_, err = s.Stdout.Write(out)
			return err
		},
	}
	s.serverFlags(cmd)
	s.namespaceFlag(cmd)
	return cmd
}

func (s *session) kubeconfig() (map[string]any, error) {
	u, err := url.Parse(s.client.Server())
	if err != nil {
		return nil, err
	}
	cluster, user := map[string]any{}, map[string]any{}
	if token := s.client.Token(); u.Scheme == "http" {
		if token != "" {
			u.User = url.UserPassword("thaw", token)
		}
	} else {
		if token != "" {
			user["token"] = token
		}
		file := s.ca
		if file == "" {
			file = s.Getenv("THAW_CA")
		}
		if file != "" {
			pem, err := os.ReadFile(file)
			if err != nil {
				return nil, err
			}
			cluster["certificate-authority-data"] = base64.StdEncoding.EncodeToString(pem)
		}
	}
	cluster["server"] = u.String()
	return map[string]any{
		"apiVersion":      "v1",
		"kind":            "Config",
		"clusters":        []any{map[string]any{"name": "thaw", "cluster": cluster}},
		"users":           []any{map[string]any{"name": "thaw", "user": user}},
		"contexts":        []any{map[string]any{"name": "thaw", "context": map[string]any{"cluster": "thaw", "user": "thaw", "namespace": s.namespace}}},
		"current-context": "thaw",
	}, nil
}

func versionCommand(env *Env) *cobra.Command {
	s := &session{Env: env}
	cmd := &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Args:  exactArgs(),
		RunE: func(*cobra.Command, []string) error {
			if err := s.checkOutput(); err != nil {
				return err
			}
			if s.structured() {
				return s.print(map[string]string{"version": s.Version, "go": runtime.Version(), "platform": runtime.GOOS + "/" + runtime.GOARCH})
			}
			_, err := fmt.Fprintf(s.Stdout, "thaw %s (%s, %s/%s)\n", s.Version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
			return err
		},
	}
	s.outputFlag(cmd, false)
	return cmd
}
