// Package chunk reads the body of an HTTP/1.1 message in chunks (RFC 9112 7.1) the way that leaves no second reading: lines end in CRLF, sizes
// are plain hexadecimal, and what is not data is bounded. A body that breaks off is io.ErrUnexpectedEOF, never io.EOF.
package chunk

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/textproto"

	"github.com/thawrun/thaw/internal/hop"
)

// Bounds of what a body has besides its data.
const (
	MaxExtra        = 16 << 10 // bytes of extensions in one body, beyond what honest chunks need
	MaxTrailerBytes = 16 << 10
	MaxTrailerLines = 100
)

// ErrMalformed says that the chunks cannot be read in one way only, or carry too much that is not data.
var ErrMalformed = errors.New("malformed chunked body")

// Reader takes one chunked body from a connection's reader. The zero value is ready.
type Reader struct {
	Trailer []hop.Field // what came after the last chunk and may be there; complete when Read returned io.EOF

	left    int64 // of the current chunk
	excess  int   // bytes that were no data, less what is allowed per chunk
	between bool  // the data of a chunk has ended, its CRLF has not been read
	err     error
}

// Read reads data. io.EOF comes after the last chunk and its trailer, and nothing beyond them is read.
func (r *Reader) Read(br *bufio.Reader, p []byte) (int, error) {
	if r.err != nil {
		return 0, r.err
	}
	if r.left == 0 {
		if err := r.next(br); err != nil {
			r.err = err
			return 0, err
		}
	}
	if int64(len(p)) > r.left {
		p = p[:r.left]
	}
	n, err := br.Read(p)
	r.left -= int64(n)
	if r.left == 0 && n > 0 {
		r.between = true
	}
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	r.err = err
	return n, err
}

// Ended says that nothing is left: the body was read to its end.
func (r *Reader) Ended() bool { return r.err == io.EOF }

// Ready says that Read will return without waiting for the other side, as far as can be told without reading.
func (r *Reader) Ready(br *bufio.Reader) bool {
	n := br.Buffered()
	if r.left > 0 {
		return n > 0
	}
	b, _ := br.Peek(n)
	if r.between {
		if len(b) < 2 {
			return false
		}
		b = b[2:]
	}
	if len(b) > 0 && b[0] == '0' { // the last chunk, most likely: ready when its trailer is complete
		return bytes.Contains(b, []byte("\r\n\r\n"))
	}
	i := bytes.IndexByte(b, '\n')
	return i >= 0 && len(b) > i+1
}

// next reads up to the data of the next chunk.
func (r *Reader) next(br *bufio.Reader) error {
	if r.between {
		line, err := readLine(br)
		if err != nil {
			return err
		}
		if len(line) != 0 {
			return ErrMalformed
		}
		r.between = false
	}
	line, err := readLine(br)
	if err != nil {
		return err
	}
	size, err := parseSize(line)
	if err != nil {
		return err
	}
	// As many bytes as data, and some, may be overhead; a body of tiny chunks with long extensions is an attack.
	r.excess = max(0, r.excess+len(line)-16-int(min(size, MaxExtra)))
	if r.excess > MaxExtra {
		return fmt.Errorf("%w: too many bytes that are no data", ErrMalformed)
	}
	if size > 0 {
		r.left = size
		return nil
	}
	return r.trailer(br)
}

// trailer reads the lines after the last chunk; it returns io.EOF after the empty one.
func (r *Reader) trailer(br *bufio.Reader) error {
	total := 0
	for lines := 0; ; lines++ {
		line, err := readLine(br)
		if err != nil {
			return err
		}
		if len(line) == 0 {
			return io.EOF
		}
		if total += len(line); total > MaxTrailerBytes || lines >= MaxTrailerLines {
			return fmt.Errorf("%w: trailer too large", ErrMalformed)
		}
		colon := bytes.IndexByte(line, ':')
		if colon <= 0 || !Token(line[:colon]) {
			return fmt.Errorf("%w: bad trailer line", ErrMalformed)
		}
		value := bytes.Trim(line[colon+1:], " \t")
		if !Value(value) {
			return fmt.Errorf("%w: bad trailer value", ErrMalformed)
		}
		if name := textproto.CanonicalMIMEHeaderKey(string(line[:colon])); hop.TrailerAllowed(name) {
			r.Trailer = append(r.Trailer, hop.Field{Name: name, Value: string(value)})
		}
	}
}

// readLine returns a line without its CRLF; the reader's buffer bounds it.
func readLine(br *bufio.Reader) ([]byte, error) {
	line, err := br.ReadSlice('\n')
	switch {
	case err == io.EOF:
		return nil, io.ErrUnexpectedEOF
	case err == bufio.ErrBufferFull:
		return nil, fmt.Errorf("%w: line too long", ErrMalformed)
	case err != nil:
		return nil, err
	case len(line) < 2 || line[len(line)-2] != '\r':
		return nil, ErrMalformed
	}
	return line[:len(line)-2], nil
}

// parseSize parses the hexadecimal size in front of a chunk; an extension after it is checked and ignored.
func parseSize(line []byte) (int64, error) {
	var n int64
	digits := 0
	for i, c := range line {
		var v byte
		switch {
		case c >= '0' && c <= '9':
			v = c - '0'
		case c >= 'a' && c <= 'f':
			v = c - 'a' + 10
		case c >= 'A' && c <= 'F':
			v = c - 'A' + 10
		default:
			// Spaces before the extension's semicolon, or at the end, were allowed once.
			rest := bytes.TrimLeft(line[i:], " \t")
			if digits == 0 || len(rest) > 0 && rest[0] != ';' || !Value(rest) {
				return 0, ErrMalformed
			}
			return n, nil
		}
		if digits++; digits > 15 {
			return 0, ErrMalformed
		}
		n = n<<4 | int64(v)
	}
	if digits == 0 {
		return 0, ErrMalformed
	}
	return n, nil
}

// AppendSize writes the line in front of a chunk of n bytes.
func AppendSize(dst []byte, n int) []byte {
	var b [18]byte
	i := len(b) - 2
	b[i], b[i+1] = '\r', '\n'
	for v := uint64(n); ; v >>= 4 {
		i--
		b[i] = "0123456789abcdef"[v&15]
		if v < 16 {
			break
		}
	}
	return append(dst, b[i:]...)
}

// AppendEnd writes the last chunk and the trailer.
func AppendEnd(dst []byte, trailer []hop.Field) []byte {
	dst = append(dst, "0\r\n"...)
	for _, f := range trailer {
		dst = f.AppendLine(dst)
	}
	return append(dst, "\r\n"...)
}

// Token says whether b may be a field's name (RFC 9110 5.6.2).
func Token(b []byte) bool {
	for _, c := range b {
		if !token[c] {
			return false
		}
	}
	return len(b) > 0
}

// Value says whether b may be a field's value: no control character but the tab.
func Value(b []byte) bool {
	const ones, high = 0x0101010101010101, 0x8080808080808080
	for ; len(b) >= 8; b = b[8:] {
		v := binary.LittleEndian.Uint64(b)
		del := v ^ 0x7f*ones
		// A byte's high bit is set if it is below the space, or DEL; maybe one too many, never one too few.
		if (v-' '*ones)&^v&high != 0 || (del-ones)&^del&high != 0 {
			break // a tab, or an error: look closer
		}
	}
	for _, c := range b {
		if c < ' ' && c != '\t' || c == 0x7f {
			return false
		}
	}
	return true
}

var token = func() (t [256]bool) {
	for c := '0'; c <= '9'; c++ {
		t[c] = true
	}
	for c := 'a'; c <= 'z'; c++ {
		t[c], t[c-'a'+'A'] = true, true
	}
	for _, c := range "!#$%&'*+-.^_`|~" {
		t[c] = true
	}
	return t
}()
