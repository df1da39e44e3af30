// Package tunnel carries the packets of a tenant's instances between the nodes that run them and the gateways that have a foot in
// the tenant's network. It has two ends:
//
//   - Worker, on a node with instances: what leaves an instance is put into a tunnel to a gateway pair of its VPC, and what a
//     pair answers goes straight into the instance. Attaching an instance is two map writes: no device, route or lock of the kernel's
//     network configuration is touched, and nobody else is asked.
//   - Member, on a gateway node: what arrives from a worker goes into the network namespace of the tenant, whose translation
//     and routes are somebody else's, and what comes back from there goes to the worker that has the instance.
//
// A VPC is a key on the wire, so tenants may use the same addresses. Everything that is not expected is dropped and
// counted by its reason: an instance that uses another's address, a worker that uses a prefix or a key that is not its own, an answer from
// somebody who is no pair of the VPC, fragments, and headers with other options than the key.
//
// All drivers are one set of small programs (eBPF, assembled here, no compiler) that run where packets enter (tc ingress);
// they differ in who writes the outer header: the program itself (Ebpf, EbpfIPIP), or a tunnel device of the kernel that is told key
// and addresses packet by packet (VXLAN, KernelGRE, KernelIPIP). Ebpf and KernelGRE speak the same on the wire, and so do EbpfIPIP and KernelIPIP.
//
// Programs live in the kernel as long as their devices, and maps, where a folder for them is given, longer than the process: a restart
// does not touch traffic. All of it needs Linux 5.10 and root.
package tunnel
