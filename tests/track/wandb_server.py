"""As much of a W&B server, on this machine, as a run needs to be online."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a request may be stuck on purpose

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.runs: list[dict[str, Any]] = []  # what a run says about itself
        self.sent: list[dict[str, Any]] = []  # its rows and its end
        self.stuck = threading.Event()  # set: rows are never answered

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # the client has gone

    def answer(self, asked: dict[str, Any]) -> dict[str, Any]:
        values = asked["variables"]
        if "UpsertBucket" in asked["query"]:
            self.runs.append(values)
            project = {"id": "p", "name": values["project"], "entity": {"id": "e", "name": "me"}}
            bucket = {"id": "b", "name": values["name"], "config": "{}", "project": project}
            bucket |= {"historyLineCount": 0, "displayName": values["displayName"]}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if "createRunFiles" in asked["query"]:
            files = [{"name": n, "uploadUrl": f"{self.url}/file/{n}"} for n in values["files"]]
            return {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": files}}
        return {}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer: dict[str, Any] = {}
        if self.path == "/graphql":
            answer = {"data": self.server.answer(json.loads(body))}
        elif self.path.endswith("/file_stream"):
            self.server.sent.append(json.loads(body))
            if self.server.stuck.is_set():
                threading.Event().wait()
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_PUT = do_POST

    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Server]:
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()
