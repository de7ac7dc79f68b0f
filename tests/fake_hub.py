"""A server with the part of the Hugging Face hub's HTTP interface that an upload needs; it keeps the files in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class FakeHub(ThreadingHTTPServer):
    """Used as `with FakeHub() as hub`: `hub.url` is its address, `hub.files` {path: content} the committed files."""

    def __init__(self, refuses: bool = False) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.refuses, self.created = refuses, {}
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        """{sha256: content} of large files, uploaded before the commit that names them"""

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Print nothing."""

    def answer(self, value: Any, code: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def do_HEAD(self) -> None:
        self.answer({})

    def do_GET(self) -> None:
        self.answer({"id": "owner/name", "sha": "0" * 40, "siblings": []})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.large[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers["Authorization"] != "Bearer secret" or self.server.refuses:
            self.answer({"error": "no right to write here"}, 403)
        elif self.path == "/api/repos/create":
            self.server.created = json.loads(body)
            self.answer({"url": f"{self.server.url}/owner/name"})
        elif self.path == "/api/validate-yaml":  # of the model card
            self.answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            modes = [("lfs" if f["path"].endswith(".safetensors") else "regular", f) for f in json.loads(body)["files"]]
            self.answer({"files": [{"path": f["path"], "uploadMode": mode, "shouldIgnore": False} for mode, f in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            upload = {"upload": {"href": f"{self.server.url}/large"}}
            self.answer({"transfer": "basic", "objects": [o | {"actions": upload} for o in json.loads(body)["objects"]]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.large[value["oid"]]
            address = f"{self.server.url}/owner/name/commit/{'0' * 40}"
            self.answer({"commitUrl": address, "commitOid": "0" * 40, "success": True})
        else:
            self.answer({"error": f"no {self.path} here"}, 404)
