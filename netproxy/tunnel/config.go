package tunnel

import "fmt"

func (c *Config) validate(worker bool) error {
	if c.Driver == "" {
		c.Driver = Ebpf
	}
	if c.Flows == 0 {
		c.Flows = 1 << 16
	}
	switch {
	case c.Driver.Overhead() == 0:
		return fmt.Errorf("tunnel driver %q: %w: want one of %v", c.Driver, ErrInvalid, Drivers())
	case c.Device == "":
		return fmt.Errorf("tunnel: %w: no device towards the other nodes", ErrInvalid)
	case worker && !c.Local.Is4():
		return fmt.Errorf("tunnel: %w: address %v of this node is not IPv4", ErrInvalid, c.Local)
	case c.Flows < 0:
		return fmt.Errorf("tunnel: %w: %d flows", ErrInvalid, c.Flows)
	}
	return nil
}
