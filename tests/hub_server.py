"""A local hub server for huggingface_hub, with configurable faults."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"

# (path of the requested file, number of its requests so far) -> the fault: an HTTP status, "drop" (the connection ends
# in the middle), "corrupt" (wrong bytes), or None.
Fault = Callable[[str, int], int | str | None]


class Hub:
    """Context manager that serves datasets and models by name, each a dict from path to content.

    A model may have several revisions, each under ``NAME@REVISION``; ``NAME`` alone is ``main``.
    """

    def __init__(
        self, datasets: dict[str, dict[str, bytes]], models: dict[str, dict[str, bytes]] | None = None
    ) -> None:
        self.datasets = datasets
        self.models = models or {}
        self.fault: Fault = lambda path, time: None
        self.requests: Counter[str] = Counter()  # number of GET requests by path
        self.gated: set[str] = set()  # models that require access
        self.heads: list[str] = []  # paths of HEAD requests
        self.ranges: list[str] = []  # requested byte ranges
        hub = self

        class Handler(_Handler):
            served = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def commit_of(model: str) -> str:
    """Return the commit at which a model is served."""
    return hashlib.sha1(model.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    served: Hub

    def log_message(self, *words: object) -> None:
        """Log nothing."""

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, with_body: bool) -> None:
        path = unquote(self.path.split("?")[0])
        if found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)(?:/revision/[^/]+)?", path):
            self._send_info(found[1])
        elif found := re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/[^/]+/?(.*)", path):
            self._list(found[1], found[2])
        elif found := re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._send(self.served.datasets.get(found[1], {}), found[2], with_body, COMMIT)
        elif found := re.fullmatch(r"/((?:[^/]+/)?[^/]+)/resolve/([^/]+)/(.+)", path):
            self._send_of_model(found[1], found[2], found[3], with_body)
        else:
            self._json(404, {"error": path})

    def _send_info(self, name: str) -> None:
        if name not in self.served.datasets:
            self._json(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        files = [{"rfilename": path} for path in self.served.datasets[name]]
        self._json(200, {"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": files})

    def _list(self, name: str, below: str) -> None:
        files = self.served.datasets.get(name, {})
        found = [
            {
                "type": "file",
                "path": path,
                "size": len(content),
                "oid": hashlib.sha1(content).hexdigest(),
                "lfs": {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134},
            }
            for path, content in files.items()
            if path.startswith(below)
        ]
        self._json(200, found)

    def _send_of_model(self, name: str, revision: str, path: str, with_body: bool) -> None:
        keys = [key for key in self.served.models if key.split("@")[0] == name]
        if not keys and "/" not in name:  # as the real hub does with OpenAI's short names
            location = {"Location": f"/openai-community/{name}/resolve/{revision}/{path}"}
            self._json(307, {"error": "moved"}, location)
            return
        if not keys:
            self._json(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return
        if (refused := self.served.gated) and name in refused:
            self._json(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
            return
        requested = name if revision == "main" else f"{name}@{revision}"
        key = next((key for key in keys if key == requested or commit_of(key) == revision), None)
        if key is None:
            self._json(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
            return
        self._send(self.served.models[key], path, with_body, commit_of(key))

    def _send(self, files: dict[str, bytes], path: str, with_body: bool, commit: str) -> None:
        content = files.get(path)
        if content is None:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}
            self._json(404, {"error": "Entry not found"}, headers)
            return
        fault = None
        if not with_body:
            self.served.heads.append(path)
        if with_body:
            self.served.requests[path] += 1
            fault = self.served.fault(path, self.served.requests[path])
        if isinstance(fault, int):
            self._json(fault, {"error": "busy"}, {"Retry-After": "0"})
            return
        start = 0
        if requested := self.headers.get("Range"):
            self.served.ranges.append(requested)
            start = int(requested.removeprefix("bytes=").split("-")[0])
        body = content[start:]
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not with_body:
            return
        if fault == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(bytes(len(body)) if fault == "corrupt" else body)

    def _json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
