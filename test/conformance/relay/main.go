// Command relay is a function for tests: it listens on $PORT and passes every connection on to $TARGET, bytes and half-closes both ways. So a
// test can be the function of a service that starts from zero, to the letter.
package main

import (
	"io"
	"log"
	"net"
	"os"
	"sync"
)

func main() {
	ln, err := net.Listen("tcp", "127.0.0.1:"+os.Getenv("PORT"))
	if err != nil {
		log.Fatal(err)
	}
	for {
		c, err := ln.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go pass(c.(*net.TCPConn))
	}
}

func pass(c *net.TCPConn) {
	defer c.Close()
	t, err := net.Dial("tcp", os.Getenv("TARGET"))
	if err != nil {
		c.SetLinger(0)
		return
	}
	defer t.Close()
	one := func(dst, src *net.TCPConn) {
		if _, err := io.Copy(dst, src); err != nil {
			dst.SetLinger(0) // an error stays an error
			dst.Close()
			return
		}
		dst.CloseWrite()
	}
	var both sync.WaitGroup
	both.Go(func() { one(t.(*net.TCPConn), c) })
	one(c, t.(*net.TCPConn))
	both.Wait()
}
