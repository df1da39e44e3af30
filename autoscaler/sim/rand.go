package sim

import "math"

// Randomness is a function of keys, not of the order of calls: every policy meets the same arrivals, service times and
// start times, however it changes the order of events.

// mix makes a key of two; it is the finalizer of splitmix64, which passes the usual tests.
func mix(a, b uint64) uint64 {
	z := a + 0x9e3779b97f4a7c15*(b+1)
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

// unit turns a key into a number in [0, 1).
func unit(key uint64) float64 { return float64(key>>11) / (1 << 53) }

// normal turns a key into a standard normal number (Box-Muller).
func normal(key uint64) float64 {
	u, v := unit(mix(key, 1)), unit(mix(key, 2))
	return math.Sqrt(-2*math.Log(1-u)) * math.Cos(2*math.Pi*v)
}

// keyOf makes a key of a name.
func keyOf(s string) uint64 {
	k := uint64(len(s))
	for i := 0; i < len(s); i++ {
		k = mix(k, uint64(s[i]))
	}
	return k
}
