//go:build race

package havip

const raceDetector = true
