package api

import "reflect"

// forbiddenFields are the fields of Kubernetes' pod that Knative refuses unless a feature flag says otherwise; no flag
// changes it here. Decode knows them by the type that they would be a field of.
var forbiddenFields = map[reflect.Type][]string{
	reflect.TypeFor[RevisionSpec](): {
		"activeDeadlineSeconds", "affinity", "dnsConfig", "dnsPolicy", "ephemeralContainers", "hostAliases", "hostIPC", "hostNetwork",
		"hostPID", "hostUsers", "hostname", "initContainers", "nodeName", "nodeSelector", "os", "overhead", "preemptionPolicy",
		"priority", "priorityClassName", "readinessGates", "resourceClaims", "restartPolicy", "runtimeClassName", "schedulerName",
		"schedulingGates", "securityContext", "serviceAccount", "setHostnameAsFQDN", "shareProcessNamespace", "subdomain",
		"terminationGracePeriodSeconds", "tolerations", "topologySpreadConstraints",
	},
	reflect.TypeFor[Container]():     {"lifecycle", "resizePolicy", "restartPolicy", "stdin", "stdinOnce", "tty", "volumeDevices"},
	reflect.TypeFor[ContainerPort](): {"hostIP", "hostPort"},
	reflect.TypeFor[Resources]():     {"claims"},
	reflect.TypeFor[Reference]():     {"address", "group"},
}

// ignoredFields are known to Kubernetes, set by its servers and sent back by its clients; there is nothing to warn about.
var ignoredFields = map[reflect.Type][]string{
	reflect.TypeFor[ObjectMeta](): {"managedFields", "selfLink", "deletionGracePeriodSeconds"},
}

// forbiddenSecurity are the fields of a container's securityContext that Knative refuses.
var forbiddenSecurity = []string{"appArmorProfile", "privileged", "procMount", "seLinuxOptions", "windowsOptions"}
