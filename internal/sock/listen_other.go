//go:build !linux

package sock

import "errors"

// inherits is false: net sets keep-alive on each connection.
const inherits = false

func keepAlive(int) error { return nil }

func share(int) error {
	return errors.New("several processes cannot listen on one address here: it needs Linux")
}
