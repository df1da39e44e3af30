// Package link is how the project speaks to the kernel about network devices: addresses with a lease, the state of devices, and
// namespaces. It is the only importer of vishvananda/netlink, whose types do not leave it. All of it needs Linux, and most of it
// CAP_NET_ADMIN in the namespace concerned.
package link
