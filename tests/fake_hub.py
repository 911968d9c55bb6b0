"""A Hub of one model, on this machine: what huggingface_hub asks of it, and no more."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c" * 40


@contextmanager
def hub(name: str, files: dict[str, bytes]) -> Iterator[tuple[str, list[str]]]:
    """Its address, and the list of the files that were asked for, with the range if any."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.answer(body=False)

        def do_GET(self) -> None:
            self.answer(body=True)

        def answer(self, *, body: bool) -> None:
            path = self.path.partition("?")[0]
            file = path.rpartition(f"/{name}/resolve/")[2].partition("/")[2]
            if path.startswith(f"/api/models/{name}/tree"):
                tree = [
                    {"type": "file", "path": one, "size": len(content), "oid": "0" * 40}
                    for one, content in files.items()
                ]
                self.send(200, json.dumps(tree).encode(), {}, body=body)
            elif path.startswith(f"/api/models/{name}"):
                told: dict[str, Any] = {"id": name, "sha": COMMIT}
                told["siblings"] = [{"rfilename": one} for one in files]
                self.send(200, json.dumps(told).encode(), {}, body=body)
            elif file in files:
                content, span = files[file], self.headers.get("Range")
                if body:
                    asked.append(f"{file} {span}" if span else file)
                if span:
                    first, _, last = span.partition("=")[2].partition("-")
                    content = content[int(first) : int(last) + 1]
                tag = {"ETag": f'"{sha256(files[file]).hexdigest()}"', "X-Repo-Commit": COMMIT}
                self.send(206 if span else 200, content, tag, body=body)
            else:
                self.send(404, b"", {"X-Error-Code": "EntryNotFound"}, body=body)

        def send(self, status: int, content: bytes, headers: dict[str, str], *, body: bool) -> None:
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            if body:
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
    finally:
        server.shutdown()
        server.server_close()
