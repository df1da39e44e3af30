"""The smallest function in Python, with the standard library only."""

import os
import signal
import socket
import socketserver
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TARGET = os.environ.get("TARGET", "World")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept for the next request
    disable_nagle_algorithm = True  # head and body go out in two writes: without this the second waits 40 ms
    timeout = 60  # seconds that an idle connection is kept

    def do_GET(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = f"Hello {TARGET} from Python, revision {os.environ.get('K_REVISION', '')}\n".encode()
        with self.server.busy:
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    do_POST = do_PUT = do_DELETE = do_GET

    def log_message(self, *_):
        pass


class Busy:
    """Counts requests that are being answered, so that the end can wait for them and not for idle connections."""

    def __init__(self):
        self.cond = threading.Condition()
        self.count = 0

    def __enter__(self):
        with self.cond:
            self.count += 1

    def __exit__(self, *_):
        with self.cond:
            self.count -= 1
            self.cond.notify_all()

    def wait(self, seconds):
        with self.cond:
            self.cond.wait_for(lambda: self.count == 0, seconds)


class Server(ThreadingHTTPServer):
    request_queue_size = 1024  # the default of 5 would refuse a burst
    daemon_threads = True
    busy = Busy()

    def __init__(self, handler):
        handed = os.environ.get("LISTEN_FDS") == "1" and os.environ.get("LISTEN_PID") == str(os.getpid())
        super().__init__(("", int(os.environ.get("PORT", "8080"))), handler, bind_and_activate=not handed)
        if handed:  # the socket on descriptor 3 listens already, and requests may be waiting in it
            self.socket.close()
            self.socket = socket.socket(fileno=3)
            self.server_name, self.server_port = self.socket.getsockname()[:2]

    def server_bind(self):
        # HTTPServer would look up this machine's name in the DNS here: a cold start must not wait for that.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]


def main():
    server = Server(Handler)
    # shutdown() waits for the loop that this signal interrupts, so it needs a thread of its own.
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
    signal.signal(signal.SIGINT, lambda *_: threading.Thread(target=server.shutdown).start())
    print(f"hello-python listens on port {server.server_port}", flush=True)
    if os.environ.get("READY_FD"):  # whoever asked for it hears that everything is set up
        os.write(int(os.environ["READY_FD"]), b"1")
    server.serve_forever(poll_interval=0.05)
    server.server_close()
    server.busy.wait(10)
    sys.stdout.flush()
    os._exit(0)  # idle connections have threads that nobody needs to wait for


main()
