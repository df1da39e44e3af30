//go:build !race

package havip

const raceDetector = false
