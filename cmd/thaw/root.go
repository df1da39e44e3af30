package main

import (
	"github.com/spf13/cobra"

	"github.com/thawrun/thaw/cmd/thaw/verbs"
)

// newRootCommand puts all commands together: the server's own and the verbs.
func newRootCommand(env *verbs.Env) *cobra.Command {
	root := &cobra.Command{
		Use:   "thaw",
		Short: "A serverless request router for one machine, or a handful",
		Long: `Thaw runs functions that wake from zero when a request comes, follow the load, and go back to sleep.
It speaks the Knative Serving API, so Service YAML, kn and kubectl work against it.

Start a server with "thaw dev", then deploy something: "thaw deploy hello --dir examples/hello-go".`,
	}
	root.AddCommand(newDevCommand(env), newDemoCommand(env), newDemoFunction(), newStoreCommand(env), newAutoscalerCommand(env), newSimulateCommand(env),
		newEtcdCommand(env), newControlCommand(env), newAgentCommand(env), newHealthCommand(env), newHoldCommand(env), newHAVIPCommand(env), newDoctorCommand(env))
	root.AddCommand(newStandaloneCommands(env)...)
	root.AddCommand(verbs.Commands(env)...)
	addGatewayRole(env, root)
	return root
}
