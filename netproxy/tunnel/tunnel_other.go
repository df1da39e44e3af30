//go:build !linux

package tunnel

import "fmt"

// OpenWorker makes the worker's end of tunnels.
func OpenWorker(cfg Config) (Worker, error) {
	if err := cfg.validate(true); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("tunnels need Linux: %w", ErrUnsupported)
}

// OpenMember makes a gateway's end of tunnels.
func OpenMember(cfg Config) (Member, error) {
	if err := cfg.validate(false); err != nil {
		return nil, err
	}
	return nil, fmt.Errorf("tunnels need Linux: %w", ErrUnsupported)
}

// MountPins makes dir a file system for Config.Pin, unless it is one.
func MountPins(string) error { return fmt.Errorf("tunnels need Linux: %w", ErrUnsupported) }
