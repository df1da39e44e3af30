// Package remote lets several autoscaler replicas decide together for reporters in other processes (activators and node agents).
//
//	reporter (Client)                               replica (Server)
//	   | --- hello: name, agent or not -------------------> |
//	   | <-- claims: the shards that it owns, with epochs - |  at once, and at each change
//	   | --- snapshots and demands of those shards -------> |  all of them: the new owner knows nothing yet
//	   | --- reports, demands, snapshots as they come ----> |  only to the owner of the revision's shard
//	   | <-- orders, with the epoch of the claim ---------- |  to agents
//
// One gRPC stream for each pair. Every reporter is connected to every replica, so a take-over needs no new connection, and no shared
// state is asked on the way of a request. Frames are numbered; a gap, a repeat or a step back ends the stream, and the next one
// begins with everything anew.
//
// What a dying owner takes along is missing, not zero: the next one begins with snapshots (the instances that there are stay, for a
// stable window with reports) and demands, and its averages with the first report. Until it has a revision's snapshot, its orders say
// "at least", and take nothing away. An owner that is one no longer, but does not know it yet, sends orders with an epoch that has
// passed; agents refuse them.
package remote
