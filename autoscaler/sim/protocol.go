package sim

// Version is the version of the line protocol that Hello carries.
const Version = 1

// Hello opens a conversation: it names the functions, which are numbered by their place in the list from then on.
type Hello struct {
	Type         string          `json:"type"` // "hello"
	Version      int             `json:"version"`
	Horizon      float64         `json:"horizon_s"`     // seconds; the last tick is not later
	MaxInstances int             `json:"max_instances"` // of one function; 0 = no bound
	Functions    []HelloFunction `json:"functions"`
}

// HelloFunction is what a policy is told of a function.
type HelloFunction struct {
	I           int    `json:"i"`
	Name        string `json:"name"`
	App         string `json:"app"`         // functions of one application have the same
	Concurrency int    `json:"concurrency"` // requests that one instance takes at a time, from 1
}

// Ready is a policy's answer to Hello.
type Ready struct {
	Type     string `json:"type"` // "ready"
	Name     string `json:"name"`
	Interval int    `json:"interval_s"` // seconds between two ticks, 1 to 60
	OnDemand string `json:"on_demand"`  // OnDemandZero or OnDemandAll
}

// What the platform does on its own between two ticks.
const (
	OnDemandZero = "zero" // a request that finds no instance at all starts one
	OnDemandAll  = "all"  // a request that the starting instances cannot take starts one more
)

// Tick is what happened since the last one.
type Tick struct {
	Type      string  `json:"type"` // "tick"
	T         float64 `json:"t"`    // seconds from the start of the trace
	Functions []Load  `json:"f"`    // only functions that had an instance or a request
	Calls     []Call3 `json:"calls,omitempty"`
	Shifts    []Shift `json:"shifts,omitempty"`
}

// Load is one function's part of a Tick.
type Load struct {
	I           int       `json:"i"`
	Concurrency []float64 `json:"c"`           // mean requests running and queued, one value a second, oldest first
	Peak        int       `json:"m,omitempty"` // most of them at one moment
	Arrivals    int       `json:"n,omitempty"` // requests that came
	Done        int       `json:"d,omitempty"` // requests that ended
	Queued      int       `json:"q,omitempty"` // now
	Running     int       `json:"run,omitempty"`
	Ready       int       `json:"r,omitempty"`
	Starting    int       `json:"s,omitempty"`
	Draining    int       `json:"x,omitempty"`
	Target      int       `json:"w,omitempty"`
	Service     float64   `json:"l,omitempty"`  // mean service time in ms of the requests that ended
	Starts      []float64 `json:"cs,omitempty"` // ms from order to ready, of instances that became ready
}

// Call3 is caller, callee and the number of calls.
type Call3 [3]int

// Shift is a step of a roll-out that begins within ten seconds.
type Shift struct {
	At     float64 `json:"at"` // seconds from the start of the trace
	From   int     `json:"from"`
	To     int     `json:"to"`
	Weight float64 `json:"weight"` // share of From's requests that go to To from then on, 0 to 1
}

// Scale is a policy's answer to a Tick.
type Scale struct {
	Type   string   `json:"type"` // "scale"
	T      float64  `json:"t"`    // of the tick
	Orders []Order2 `json:"d"`
}

// Order2 is a function and its target from now on.
type Order2 [2]int

// Policy decides. It depends on nothing but what it was told, so that a replay gives the same answers.
type Policy interface {
	// Hello is called once, first.
	Hello(h *Hello) Ready
	// Tick returns the targets that change. It keeps nothing of t, and the answer is valid until the next call.
	Tick(t *Tick) []Order2
}
