// Command websocket-echo sends back each message that it gets over a WebSocket (RFC 6455), with the standard library only, to
// show that an upgraded connection passes all parts. A request without an upgrade gets a small page that tries it.
package main

import (
	"bufio"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/thawrun/thaw/examples/serve"
)

// maxMessage bounds a message, in bytes.
const maxMessage = 1 << 20

// idle is how long a connection may be silent.
const idle = 5 * time.Minute

const page = `<!doctype html><title>echo</title><input id=i placeholder="say something"><pre id=o></pre><script>
const s = new WebSocket(location.href.replace(/^http/, "ws"));
s.onmessage = e => o.textContent += e.data + "\n";
i.onchange = () => { s.send(i.value); i.value = ""; };
</script>
`

func main() {
	err := serve.Run(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !hasToken(r.Header, "Connection", "upgrade") || !hasToken(r.Header, "Upgrade", "websocket") {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			fmt.Fprint(w, page)
			return
		}
		if err := echo(w, r); err != nil && !errors.Is(err, io.EOF) {
			log.Printf("connection ended: %v", err)
		}
	}))
	if err != nil {
		log.Fatal(err)
	}
}

func hasToken(h http.Header, name, token string) bool {
	for _, v := range h.Values(name) {
		if slices.ContainsFunc(strings.Split(v, ","), func(s string) bool { return strings.EqualFold(strings.TrimSpace(s), token) }) {
			return true
		}
	}
	return false
}

// Frame types of RFC 6455, section 5.2.
const (
	opContinuation = 0
	opText         = 1
	opBinary       = 2
	opClose        = 8
	opPing         = 9
	opPong         = 10
)

// Close codes, section 7.4.1.
const (
	closeNormal   = 1000
	closeProtocol = 1002
	closeInvalid  = 1007
	closeTooBig   = 1009
)

// closeError ends a connection with a code.
type closeError struct {
	code uint16
	text string
}

func (e closeError) Error() string { return e.text }

// echo upgrades the connection and serves it until it ends.
func echo(w http.ResponseWriter, r *http.Request) error {
	key := r.Header.Get("Sec-WebSocket-Key")
	if raw, err := base64.StdEncoding.DecodeString(key); err != nil || len(raw) != 16 || r.Header.Get("Sec-WebSocket-Version") != "13" {
		w.Header().Set("Sec-WebSocket-Version", "13")
		http.Error(w, "not a WebSocket handshake of version 13", http.StatusBadRequest)
		return nil
	}
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		http.Error(w, "this connection cannot be upgraded", http.StatusInternalServerError)
		return nil
	}
	defer conn.Close()
	sum := sha1.Sum([]byte(key + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11")) // the constant of section 1.3
	fmt.Fprintf(buf, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: %s\r\n\r\n",
		base64.StdEncoding.EncodeToString(sum[:]))
	if err := buf.Flush(); err != nil {
		return err
	}
	for {
		if err := conn.SetDeadline(time.Now().Add(idle)); err != nil {
			return err
		}
		op, message, err := readMessage(buf)
		var ce closeError
		switch {
		case errors.As(err, &ce):
			_ = writeFrame(buf.Writer, opClose, binary.BigEndian.AppendUint16(nil, ce.code))
			return err
		case err != nil:
			return err
		case op == opClose:
			if len(message) < 2 {
				message = binary.BigEndian.AppendUint16(nil, closeNormal)
			}
			return writeFrame(buf.Writer, opClose, message[:2])
		}
		if err := writeFrame(buf.Writer, op, message); err != nil {
			return err
		}
	}
}

// readMessage returns the next message, put together from its frames, or a close frame. Pings are answered on the way.
func readMessage(buf *bufio.ReadWriter) (op byte, message []byte, err error) {
	for {
		fin, kind, payload, err := readFrame(buf.Reader, maxMessage-len(message))
		if err != nil {
			return 0, nil, err
		}
		switch kind {
		case opPing:
			if err := writeFrame(buf.Writer, opPong, payload); err != nil {
				return 0, nil, err
			}
			continue
		case opPong:
			continue
		case opClose:
			return opClose, payload, nil
		case opContinuation:
			if op == 0 {
				return 0, nil, closeError{closeProtocol, "a message begins with a continuation"}
			}
		case opText, opBinary:
			if op != 0 {
				return 0, nil, closeError{closeProtocol, "a message begins inside another one"}
			}
			op = kind
		default:
			return 0, nil, closeError{closeProtocol, fmt.Sprintf("unknown frame type %d", kind)}
		}
		message = append(message, payload...)
		if fin {
			if op == opText && !utf8.Valid(message) {
				return 0, nil, closeError{closeInvalid, "a text message is not UTF-8"}
			}
			return op, message, nil
		}
	}
}

// readFrame reads one frame of a client: always masked, at most limit bytes.
func readFrame(r *bufio.Reader, limit int) (fin bool, op byte, payload []byte, err error) {
	var head [8]byte
	if _, err = io.ReadFull(r, head[:2]); err != nil {
		return false, 0, nil, err
	}
	fin, op = head[0]&0x80 != 0, head[0]&0x0f
	if head[0]&0x70 != 0 {
		return false, 0, nil, closeError{closeProtocol, "reserved bits are set"}
	}
	if head[1]&0x80 == 0 {
		return false, 0, nil, closeError{closeProtocol, "a frame of the client is not masked"}
	}
	size := uint64(head[1] & 0x7f)
	if op >= opClose && (!fin || size > 125) {
		return false, 0, nil, closeError{closeProtocol, "a control frame is fragmented or too long"}
	}
	switch size {
	case 126:
		if _, err = io.ReadFull(r, head[:2]); err != nil {
			return false, 0, nil, err
		}
		size = uint64(binary.BigEndian.Uint16(head[:2]))
	case 127:
		if _, err = io.ReadFull(r, head[:8]); err != nil {
			return false, 0, nil, err
		}
		size = binary.BigEndian.Uint64(head[:8])
	}
	if op < opClose && size > uint64(limit) {
		return false, 0, nil, closeError{closeTooBig, fmt.Sprintf("a message is longer than %d bytes", maxMessage)}
	}
	var mask [4]byte
	if _, err = io.ReadFull(r, mask[:]); err != nil {
		return false, 0, nil, err
	}
	payload = make([]byte, size)
	if _, err = io.ReadFull(r, payload); err != nil {
		return false, 0, nil, err
	}
	for i := range payload {
		payload[i] ^= mask[i&3]
	}
	return fin, op, payload, nil
}

// writeFrame writes one whole, unmasked frame.
func writeFrame(w *bufio.Writer, op byte, payload []byte) error {
	head := []byte{0x80 | op}
	switch n := len(payload); {
	case n <= 125:
		head = append(head, byte(n))
	case n <= 0xffff:
		head = binary.BigEndian.AppendUint16(append(head, 126), uint16(n))
	default:
		head = binary.BigEndian.AppendUint64(append(head, 127), uint64(n))
	}
	if _, err := w.Write(head); err != nil {
		return err
	}
	if _, err := w.Write(payload); err != nil {
		return err
	}
	return w.Flush()
}
