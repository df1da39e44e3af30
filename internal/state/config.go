package state

import "time"

// defaultProgress is how often an idle watch gets a progress mark.
const defaultProgress = 5 * time.Second
