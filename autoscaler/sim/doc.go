// Package sim replays traces of requests against scaling policies on a virtual clock. It is a discrete-event simulator of a small
// platform (functions, instances that take time to start, a queue for each function), a set of policies (Knative's autoscaler and the
// planner, both the code that runs live, and two well-known simple ones), the metrics of a run, and the line protocol by which
// a policy can serve a simulator in another process.
//
// Everything random is a function of the seed and of what it belongs to, not of the order of events: every policy meets the same
// arrivals, service times and start times, and a run can be repeated. It is used by `thaw simulate`, `thaw autoscaler sim` and the tests;
// nothing of it runs live.
package sim
