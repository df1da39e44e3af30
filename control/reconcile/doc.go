// Package reconcile turns what people wrote into what runs: services into configurations and routes, configurations into
// revisions, routes and domain mappings into the one route table, and old revisions into nothing. It keeps the status of
// all five kinds true.
//
// Everything here is level-triggered. A change of an object, a report about instances, or a timer puts a key into a queue;
// a worker takes the key and compares the whole object with the whole world, whatever it was that changed. A key is never
// worked twice at once, bursts fold into one pass, failures come back later. Losing a notification therefore costs time,
// never truth, and a restart is only "look at everything once".
//
// Objects are read from a cache that follows the store (list, then watch from that revision) and that also takes in our
// own writes at once; writes compare the revision they are based on. Objects in the cache are shared with everybody and
// never modified.
//
// Nothing here lies on the way of a request: readers of the route table hold an immutable snapshot, and reports about
// instances are only remembered and written to the store later, at most about once a second for each revision.
//
// The caller connects the package with the rest by Platform and Resolver, calls ObserveInstances and ObserveScale, and
// waits for Synced before it serves. New starts nothing; Run returns after everything that it started has ended.
package reconcile
