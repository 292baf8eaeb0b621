"""Stands in for vLLM: answers on a port. `python stand_in.py PORT [--fail LINE] [--live-s S]
[--ignore-sigterm]`

--live-s: seconds from the first completion, which is the one that makes it ready, to an end that
nobody asked for.
"""

import argparse
import hmac
import json
import os
import signal
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

parser = argparse.ArgumentParser()
parser.add_argument("port", type=int)
parser.add_argument("--fail")
parser.add_argument("--live-s", type=float)
parser.add_argument("--ignore-sigterm", action="store_true")
arguments = parser.parse_args()

if arguments.fail:
    print(arguments.fail, flush=True)
    sys.exit(3)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        body = json.dumps({"data": [{"id": "stand-in"}]}).encode()
        if self.path == "/gradmap-proof":
            challenge = self.headers["X-Gradmap-Challenge"].encode()
            body = (
                hmac.new(os.environ["GRADMAP_PASS"].encode(), challenge, "sha256")
                .hexdigest()
                .encode()
            )
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()
        if arguments.live_s:
            threading.Timer(arguments.live_s, server.shutdown).start()

    def log_message(self, *_):
        pass


server = ThreadingHTTPServer(("127.0.0.1", arguments.port), Handler)
stop = lambda *_: threading.Thread(target=server.shutdown).start()  # noqa: E731
signal.signal(signal.SIGTERM, signal.SIG_IGN if arguments.ignore_sigterm else stop)
server.serve_forever()
