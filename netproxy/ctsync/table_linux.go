package ctsync

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// kernel is the table of the namespace in which it was opened. One goroutine uses it.
type kernel struct {
	inject int              // socket that changes go through; what it did comes back as events with portID
	portID uint32           // of inject
	own    map[[4]byte]bool // addresses of the router itself
	failed func(unix.Errno) // told of refusals that are not part of the plan
	req    request
	buf    []byte
}

const receiveBuffer = 8 << 20 // a burst of events or of copied datagrams; the kernel counts its bookkeeping into it

func openConntrack(groups uint32) (fd int, portID uint32, err error) {
	fd, err = unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return -1, 0, fmt.Errorf("conntrack: %w", err)
	}
	err = unix.Bind(fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK, Groups: groups})
	var sa unix.Sockaddr
	if err == nil {
		sa, err = unix.Getsockname(fd)
	}
	if err != nil {
		unix.Close(fd)
		return -1, 0, fmt.Errorf("conntrack: %w", err)
	}
	return fd, sa.(*unix.SockaddrNetlink).Pid, nil
}

// ignore keeps the events that a socket's requests caused from another one. They are as many as the peer has entries when its table is
// copied, and would push out those that matter. The filter runs on each event: the sender's port id is the word at 12, which the
// filter reads as big endian.
func ignore(fd int, portID uint32) error {
	id := binary.BigEndian.Uint32(native.AppendUint32(nil, portID))
	prog := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 12},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jt: 1, K: id},
		{Code: unix.BPF_RET | unix.BPF_K, K: 1 << 18}, // all of it
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
	}
	err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]})
	if err != nil {
		return fmt.Errorf("conntrack events: %w", err)
	}
	return nil
}

// largeBuffer asks for receiveBuffer, or for what the system allows an ordinary user.
func largeBuffer(fd int) {
	if unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, receiveBuffer) != nil {
		_ = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, receiveBuffer)
	}
}

func openKernel(failed func(unix.Errno)) (*kernel, error) {
	fd, id, err := openConntrack(0)
	if err != nil {
		return nil, err
	}
	return &kernel{inject: fd, portID: id, failed: failed, buf: make([]byte, 64<<10)}, nil
}

func (k *kernel) close() { unix.Close(k.inject) }

// count is the number of entries; 0 where the kernel does not say.
func (k *kernel) count() int {
	b, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_count")
	if err != nil {
		return 0
	}
	n, _ := strconv.Atoi(strings.TrimSpace(string(b)))
	return n
}

// apply enters changes with one system call for all of them, without acknowledgement: the kernel works through them before the call
// returns, and says by then what it refused. Most refusals are part of the plan and tried another way: an old entry has the addresses and
// ports of one direction of a new connection, or what is to be changed is not there. What else the list says about such an entry comes
// again after it: a connection that has been established since must not be left as it began.
func (k *kernel) apply(list []Change) {
	const rounds = 3 // a copy may be refused as new, as changed, and then takes the place of what is there
	for round := range rounds {
		var retried map[int]Change
		var since map[Key]int // the first one of an entry that is retried
		k.submit(list, func(i int, errno unix.Errno) {
			c := list[i]
			if _, again := since[c.Key]; again {
				return
			}
			exists, missing := errno == unix.EEXIST, errno == unix.ENOENT
			switch {
			case c.Kind == Destroy && missing, c.Kind == replace && missing, c.Kind == offer && exists:
				return // as wanted
			case c.Kind == Copy && exists:
				c.Kind = Update
			case c.Kind == Update && missing && round == 0:
				c.Kind = Create
			case c.Kind == Update && missing, c.Kind == Create && exists:
				c.Kind = replace
			default:
				k.failed(errno)
				return
			}
			if retried == nil {
				retried, since = map[int]Change{}, map[Key]int{}
			}
			retried[i], since[c.Key] = c, i
		})
		if retried == nil {
			return
		}
		var again []Change
		for i, c := range list {
			if r, ok := retried[i]; ok {
				again = append(again, r)
			} else if first, ok := since[c.Key]; ok && i > first {
				again = append(again, c)
			}
		}
		list = again
	}
	for range list {
		k.failed(unix.EEXIST)
	}
}

func (k *kernel) submit(list []Change, refused func(int, unix.Errno)) {
	if len(list) == 0 {
		return
	}
	k.req = k.req[:0]
	for i := range list {
		switch c := &list[i]; c.Kind {
		case Create, Copy, offer:
			k.req.create(&c.Entry, uint32(i))
		case Update:
			k.req.update(&c.Entry, uint32(i))
		case Destroy:
			k.req.remove(c.Key, ctaTupleOrig, c.Orig, uint32(i))
		case replace:
			k.req.remove(c.Key, ctaTupleOrig, c.Orig, uint32(i))
			k.req.remove(c.Key, ctaTupleReply, c.Reply, uint32(i))
			k.req.create(&c.Entry, uint32(i))
		}
	}
	if err := unix.Sendto(k.inject, k.req, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		errno, _ := errors.AsType[unix.Errno](err)
		k.failed(errno)
	}
	for {
		n, _, err := unix.Recvfrom(k.inject, k.buf, unix.MSG_DONTWAIT)
		if err == unix.ENOBUFS {
			continue // some refusals are lost; the copy of each minute makes up for it
		}
		if err != nil {
			return
		}
		for rest := k.buf[:n]; ; {
			m, r, ok := nextMessage(rest)
			if !ok {
				break
			}
			rest = r
			if m.kind != typeError || len(m.body) < 4+nlmsgHeader {
				continue
			}
			errno := unix.Errno(-int32(native.Uint32(m.body)))
			if i := native.Uint32(m.body[12:]); errno != 0 && int(i) < len(list) {
				refused(int(i), errno)
			}
		}
	}
}

// read takes what is in a datagram of the kernel to f.
func (k *kernel) read(b []byte, f func(Change)) (done bool, err error) {
	for {
		m, rest, ok := nextMessage(b)
		if !ok {
			return false, nil
		}
		b = rest
		switch m.kind {
		case typeDone:
			return true, nil
		case typeError:
			if len(m.body) >= 4 && native.Uint32(m.body) != 0 {
				return true, fmt.Errorf("conntrack: %w", unix.Errno(-int32(native.Uint32(m.body))))
			}
		default:
			if c, ok := parseEvent(m); ok && !c.local(k.own) {
				f(c)
			}
		}
	}
}

// walk reads the table through a socket of its own, because a socket can have only one listing under way.
func (k *kernel) walk() (walker, error) {
	fd, _, err := openConntrack(0)
	if err != nil {
		return nil, err
	}
	var r request
	r.dump(1)
	if err := unix.Sendto(fd, r, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("list conntrack: %w", err)
	}
	return &kernelWalker{k, fd}, nil
}

type kernelWalker struct {
	k  *kernel
	fd int
}

// next takes one datagram, which the kernel makes while we wait: a listing never waits for anything else.
func (w *kernelWalker) next(list []Change) ([]Change, bool, error) {
	n, _, err := unix.Recvfrom(w.fd, w.k.buf, 0)
	if err == unix.EINTR {
		return list, true, nil
	}
	if err != nil {
		return list, false, fmt.Errorf("list conntrack: %w", err)
	}
	done, err := w.k.read(w.k.buf[:n], func(c Change) {
		c.Kind = Copy
		list = append(list, c)
	})
	return list, !done, err
}

func (w *kernelWalker) close() { unix.Close(w.fd) }
