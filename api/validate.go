package api

// Limits are the bounds that an installation may move.
type Limits struct {
	MaxTimeoutSeconds int64 // of timeoutSeconds, and so of the other two
	MaxConcurrency    int64 // of containerConcurrency
	MaxScale          int64 // of max-scale and, where that is 0, required; 0 = no bound
}

// DefaultLimits are Knative's.
var DefaultLimits = Limits{MaxTimeoutSeconds: 600, MaxConcurrency: 1000}

// Validate returns what is wrong with o, which SetDefaults has seen. old is the stored object when o replaces it, nil when
// o is new.
func Validate(o, old Object, l Limits) Errors {
	var errs Errors
	return errs
}

// Unsupported returns one sentence for each field of o that is accepted and kept but has no effect yet.
func Unsupported(o Object) []string { return nil }
