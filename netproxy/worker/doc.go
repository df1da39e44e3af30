// Package worker keeps slots for instances in tenants' networks ready on a node: network namespaces with a device that leads
// into the tunnels of netproxy/tunnel, with an address, a route and a neighbour. What makes one takes milliseconds, and now and then a tenth of a
// second, because the kernel has one lock for it; that lies behind an instance before it is known. Attaching is then two map writes.
//
// A slot is used once. It is given back by closing its namespace: the kernel takes the device away when nobody is in it any more, the
// pool hears of that, and only then is the address anybody else's. So nothing has to be remembered: when the process is killed, slots that were ready
// vanish with it, and those with an instance are found again.
//
// Instances are trusted with nothing: the node drops what comes out of a slot otherwise than by the tunnel's program, by a rule of its own
// that is there even if the program is not.
package worker
