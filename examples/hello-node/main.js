// The smallest function in Node, with the standard library only.
'use strict';
const fs = require('node:fs');
const http = require('node:http');

const target = process.env.TARGET || 'World';
const port = Number(process.env.PORT || 8080);

const server = http.createServer((req, res) => {
  req.resume(); // a body that is not read would keep the connection from being used again
  req.on('end', () => {
    res.setHeader('Content-Type', 'text/plain; charset=utf-8');
    res.end(`Hello ${target} from Node, revision ${process.env.K_REVISION || ''}\n`);
  });
});
server.keepAliveTimeout = 60_000;
// The socket on descriptor 3, if one was handed over, listens already, and requests may be waiting in it.
const handed = process.env.LISTEN_FDS === '1' && process.env.LISTEN_PID === String(process.pid);
server.listen(handed ? { fd: 3 } : port, () => {
  console.log(`hello-node listens on ${handed ? 'descriptor 3' : `port ${port}`}`);
  // Whoever asked for it hears that everything is set up.
  if (process.env.READY_FD) fs.writeSync(Number(process.env.READY_FD), '1');
});

// close() takes nothing new, answers what is under way, and ends connections as they get idle.
for (const signal of ['SIGTERM', 'SIGINT']) {
  process.on(signal, () => {
    server.close(() => process.exit(0));
    server.closeIdleConnections();
  });
}
