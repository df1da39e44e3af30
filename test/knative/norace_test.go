//go:build !race

package knative

const raceEnabled = false
