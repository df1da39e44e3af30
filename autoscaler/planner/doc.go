// Package planner decides how many instances a function should have from what it has done before. It stands beside Knative's
// rules, which only look back over a window: the planner weighs, for each instance, what keeping it costs (seconds that it
// idles) against what it saves (cold starts). One number sets the rate of exchange: Config.Value, the idle seconds that one
// avoided cold start is worth.
//
// A function's load is cut into levels: level k is needed in a second whose mean concurrency does not fit into k-1 instances.
// For each level the planner learns how long the pauses between two needs are, as hazards: the chance that a pause
// ends now, given that it lasted until now. From these follows the cheapest plan for a pause: how long to keep the instance,
// and when to start it again ahead of the next need. Three forecasters compete, the one with less regret is followed:
//
//   - age: the hazards of the level's own pauses, over a prior that all functions share, so that a new function starts with what
//     the others have taught;
//   - timer: the level is needed at a fixed distance, so it is started just ahead of that;
//   - stream: requests come independently and often (Poisson), so the spread around their mean says how much reserve is worth it.
//
// Two more things raise a target: calls (who calls whom is learnt; the callee is started when the caller gets a request or waits
// for an instance itself) and announced shifts of traffic (the next version is started before its share comes).
//
// Use: Add each function, then once a second (or every few seconds; Load.Seconds has one value for each) Observe every
// function that had an instance or a request, and ask Decide. Decision.Wake says when to ask again although nothing happened: that is how
// a function without instances gets one ahead of its next request; keep these times in a timer wheel or a heap. Target is the whole
// number of instances to have, the load's need included; a caller that has other rules takes the larger number.
//
// The planner is pure: no clock, no locks, no goroutines, the same calls give the same answers. Time is in seconds of the
// caller's clock; it must go on after a restart (Unix time does) if states are restored. Once a function has seen its load,
// Observe and Decide do not allocate. It is not safe for concurrent use.
package planner
