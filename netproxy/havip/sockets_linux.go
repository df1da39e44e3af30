package havip

import (
	"encoding/binary"
	"fmt"
	"net/netip"

	"golang.org/x/sys/unix"
)

var group = netip.AddrFrom4([4]byte{224, 0, 0, 18})

// adverts is a device's way to send and hear adverts. Sending and hearing are two sockets, because one that is bound to our address
// would not hear the group.
type adverts struct {
	in, out int
	own     netip.Addr
}

func openAdverts(device string, index int, own netip.Addr) (*adverts, error) {
	a := &adverts{in: -1, out: -1, own: own}
	err := a.open(device, index)
	if err != nil {
		a.close()
		return nil, fmt.Errorf("adverts on %s: %w", device, err)
	}
	return a, nil
}

func (a *adverts) open(device string, index int) (err error) {
	for _, fd := range []*int{&a.in, &a.out} {
		*fd, err = unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocolVRRP)
		if err != nil {
			return err
		}
		if err = unix.BindToDevice(*fd, device); err != nil {
			return err
		}
	}
	mreq := &unix.IPMreqn{Multiaddr: group.As4(), Ifindex: int32(index)}
	if err = unix.SetsockoptIPMreqn(a.in, unix.IPPROTO_IP, unix.IP_ADD_MEMBERSHIP, mreq); err != nil {
		return err
	}
	if err = unix.Bind(a.out, &unix.SockaddrInet4{Addr: a.own.As4()}); err != nil {
		return err
	}
	for _, o := range []struct{ name, value int }{
		{unix.IP_MULTICAST_TTL, 255}, {unix.IP_MULTICAST_LOOP, 0}, {unix.IP_TOS, 0xc0}, // internetwork control
	} {
		if err = unix.SetsockoptInt(a.out, unix.IPPROTO_IP, o.name, o.value); err != nil {
			return err
		}
	}
	// The sender's side of the socket hears the unicast packets of the protocol, which nobody reads.
	_ = unix.SetsockoptInt(a.out, unix.SOL_SOCKET, unix.SO_RCVBUF, 1)
	return unix.SetsockoptIPMreqn(a.out, unix.IPPROTO_IP, unix.IP_MULTICAST_IF, mreq)
}

func (a *adverts) close() {
	for _, fd := range []int{a.in, a.out} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

func (a *adverts) send(b []byte) error {
	return unix.Sendto(a.out, b, 0, &unix.SockaddrInet4{Addr: group.As4()})
}

// unwrap takes the IP header off a packet of a raw socket; false for one that came over a router (RFC 5798: TTL has to be 255), is
// not for the group, or is our own.
func unwrap(b []byte, own netip.Addr) (payload []byte, from netip.Addr, ok bool) {
	if len(b) < 20 {
		return nil, from, false
	}
	head := int(b[0]&15) * 4
	from = netip.AddrFrom4([4]byte(b[12:16]))
	ok = b[0]>>4 == 4 && head >= 20 && len(b) >= head && b[8] == 255 && [4]byte(b[16:20]) == group.As4() && from != own
	if !ok {
		return nil, from, false
	}
	return b[head:], from, true
}

// openAnnounce returns a socket for frames.
func openAnnounce() (int, error) {
	fd, err := unix.Socket(unix.AF_PACKET, unix.SOCK_RAW|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return -1, fmt.Errorf("announcements: %w", err)
	}
	return fd, nil
}

// announcement is a gratuitous ARP request (RFC 5227, section 3): everyone on the link who has the address in the cache takes the new MAC. A
// request rather than an answer, because some caches ignore answers that they did not ask for.
func announcement(mac [6]byte, addr netip.Addr) []byte {
	v := addr.As4()
	b := append(make([]byte, 0, 42), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff)
	b = append(b, mac[:]...)
	b = append(b, 0x08, 0x06, 0, 1, 0x08, 0, 6, 4, 0, 1)
	b = append(append(b, mac[:]...), v[:]...)
	return append(append(b, 0, 0, 0, 0, 0, 0), v[:]...)
}

func announce(fd, index int, frame []byte) error {
	var proto [2]byte
	binary.BigEndian.PutUint16(proto[:], unix.ETH_P_ARP)
	return unix.Sendto(fd, frame, 0, &unix.SockaddrLinklayer{Protocol: binary.NativeEndian.Uint16(proto[:]), Ifindex: index})
}
