//go:build race

package knative

const raceEnabled = true
