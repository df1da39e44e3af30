package chunk

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/http/httputil"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/thawrun/thaw/internal/hop"
)

func readAll(r io.Reader) (data []byte, trailer []hop.Field, err error) {
	br := bufio.NewReaderSize(r, 16<<10)
	var c Reader
	buf := make([]byte, 700)
	for {
		n, err := c.Read(br, buf)
		data = append(data, buf[:n]...)
		if err != nil {
			return data, c.Trailer, err
		}
	}
}

func TestReader(t *testing.T) {
	tiny := strings.Repeat("1\r\nx\r\n", 50_000)
	for _, c := range []struct {
		in, data, trailer string
		err               error
	}{
		{"0\r\n\r\n", "", "[]", io.EOF},
		{"5\r\nhello\r\n0\r\n\r\nnext", "hello", "[]", io.EOF},
		{"005;a=\"b\"\r\nhello\r\nA\r\n0123456789\r\n0 ; x\r\n\r\n", "hello0123456789", "[]", io.EOF},
		{tiny + "0\r\n\r\n", strings.Repeat("x", 50_000), "[]", io.EOF},
		{"0\r\nx-a: 1\r\nX-A:2 \r\nContent-Length: 5\r\nhost: h\r\n\r\n", "", "[{X-A 1} {X-A 2}]", io.EOF},
		{"", "", "[]", io.ErrUnexpectedEOF},
		{"5", "", "[]", io.ErrUnexpectedEOF},
		{"5\r\nhel", "hel", "[]", io.ErrUnexpectedEOF},
		{"5\r\nhello", "hello", "[]", io.ErrUnexpectedEOF},
		{"5\r\nhello\r\n", "hello", "[]", io.ErrUnexpectedEOF},
		{"5\r\nhello\r\n0\r\n", "hello", "[]", io.ErrUnexpectedEOF},
		{"5\r\nhello\r\n0\r\nA: b\r\n", "hello", "[{A b}]", io.ErrUnexpectedEOF},
		{"5\nhello\r\n0\r\n\r\n", "", "[]", ErrMalformed},
		{"5\r\nhello\n0\r\n\r\n", "hello", "[]", ErrMalformed},
		{"5\r\nhelloX\r\n", "hello", "[]", ErrMalformed},
		{"+5\r\n", "", "[]", ErrMalformed},
		{"-5\r\n", "", "[]", ErrMalformed},
		{"0x5\r\n", "", "[]", ErrMalformed},
		{" 5\r\n", "", "[]", ErrMalformed},
		{"\r\n", "", "[]", ErrMalformed},
		{";a\r\n", "", "[]", ErrMalformed},
		{"5 a\r\n", "", "[]", ErrMalformed},
		{"5;a\x00\r\n", "", "[]", ErrMalformed},
		{"5;a\rb\r\n", "", "[]", ErrMalformed},
		{"1000000000000000\r\n", "", "[]", ErrMalformed},
		{"0\r\nA B: c\r\n\r\n", "", "[]", ErrMalformed},
		{"0\r\n: c\r\n\r\n", "", "[]", ErrMalformed},
		{"0\r\nA: b\x00\r\n\r\n", "", "[]", ErrMalformed},
		{"0\r\nA: b\r\n c\r\n\r\n", "", "[{A b}]", ErrMalformed},
		{"0\r\n" + strings.Repeat("A: b\r\n", 101) + "\r\n", "", "", ErrMalformed},
		{"5;" + strings.Repeat("x", 20_000) + "\r\nhello\r\n0\r\n\r\n", "", "[]", ErrMalformed},
		{strings.Repeat("1;"+strings.Repeat("x", 200)+"\r\nx\r\n", 100) + "0\r\n\r\n", strings.Repeat("x", 88), "[]", ErrMalformed},
	} {
		for name, r := range map[string]io.Reader{"whole": strings.NewReader(c.in), "bytes": iotest.OneByteReader(strings.NewReader(c.in))} {
			data, trailer, err := readAll(r)
			if string(data) != c.data || !errors.Is(err, c.err) || c.trailer != "" && fmt.Sprint(trailer) != c.trailer {
				t.Errorf("%.60q (%s): %.60q (%d), %v, %v; want %.60q, %s, %v", c.in, name, data, len(data), trailer, err, c.data, c.trailer, c.err)
			}
		}
	}
}

// Ready must be true when everything is there, or a stream's end would be flushed on its own, and false when Read would wait.
func TestReady(t *testing.T) {
	for in, want := range map[string]bool{
		"5\r\nhello": true, "5\r\nh": true, "5\r\n": false, "5": false, "": false, "0\r\n\r\n": true, "0\r\nA: b\r\n\r\n": true, "0\r\n": false, "0\r\nA: b\r\n": false,
	} {
		br := bufio.NewReader(strings.NewReader(in))
		br.Peek(len(in))
		var c Reader
		if got := c.Ready(br); got != want {
			t.Errorf("%q: %v", in, got)
		}
	}
}

func TestAppend(t *testing.T) {
	for _, n := range []int{1, 15, 16, 255, 65536, 1<<40 - 1} {
		if got := string(AppendSize(nil, n)); got != fmt.Sprintf("%x\r\n", n) {
			t.Errorf("%d: %q", n, got)
		}
	}
	if got := string(AppendEnd(nil, []hop.Field{{Name: "A", Value: "b"}})); got != "0\r\nA: b\r\n\r\n" {
		t.Errorf("%q", got)
	}
}

// What is accepted is read in the same way by another parser and in whatever pieces it comes; what breaks off is never accepted.
func FuzzReader(f *testing.F) {
	for _, s := range []string{"0\r\n\r\n", "5;x\r\nhello\r\n0\r\nA: b\r\n\r\n", "5\r\nhello\r\n", "a\nb", "1\r\nx\r\n00\r\n\r\nrest"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, in []byte) {
		data, trailer, err := readAll(bytes.NewReader(in))
		slow, slowTrailer, slowErr := readAll(iotest.OneByteReader(bytes.NewReader(in)))
		if !bytes.Equal(data, slow) || fmt.Sprint(trailer) != fmt.Sprint(slowTrailer) || (err == io.EOF) != (slowErr == io.EOF) {
			t.Fatalf("in pieces %q, %v, %v; whole %q, %v, %v", slow, slowTrailer, slowErr, data, trailer, err)
		}
		if err != io.EOF {
			return
		}
		other, otherErr := io.ReadAll(httputil.NewChunkedReader(bytes.NewReader(in)))
		if otherErr != nil || !bytes.Equal(data, other) {
			t.Fatalf("another parser: %q, %v; ours %q", other, otherErr, data)
		}
		var wire []byte
		if len(data) > 0 {
			wire = append(append(AppendSize(wire, len(data)), data...), "\r\n"...)
		}
		again, againTrailer, err := readAll(bytes.NewReader(AppendEnd(wire, trailer)))
		if err != io.EOF || !bytes.Equal(again, data) || fmt.Sprint(againTrailer) != fmt.Sprint(trailer) {
			t.Fatalf("written again: %q, %v, %v", again, againTrailer, err)
		}
	})
}
