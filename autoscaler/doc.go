// Package autoscaler turns load into a number of instances. It has a pure core and a loop around it.
//
// The core is a few functions that are told the time and touch nothing: PolicyFor resolves keys and annotations, Window
// averages reports, Decide is Knative's pod autoscaler (KPA) step for step, Need sizes an event from the true queue
// length, and Settle applies what comes after them: bounds, the initial scale, and the rules for going to zero.
//
// The loop (Autoscaler) owns one revision's state per service revision. It acts on events (a demand from an activator, a
// change of instances, a change of the revision) at once, and on a tick every two seconds for revisions that have
// instances or load. A revision at zero has no timer: it costs memory only.
//
// Callers promise: SetRevision before anything else about a revision; one snapshot of a revision at a time; Scaler and
// Subscribe callbacks that return quickly, because they run on the loop. The package promises: no callback is made with a
// lock held; a scale is ordered only when it changes or when instances got lost; missing reports never scale down.
//
// It does not start instances, store anything, or know of HTTP and etcd.
package autoscaler
