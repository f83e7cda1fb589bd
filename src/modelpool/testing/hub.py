"""A small model hub on loopback, for tests: what `huggingface_hub` asks of one, and its bad days.

with serving_hub({"org/model": Repository({"config.json": b"{}"})}) as hub:
    ...  # HF_ENDPOINT=hub.url
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

GOOD_TOKEN = "hf_good"
_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>[^/]+))?")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)")


@dataclass
class Repository:
    """Files by path. `gated`: only who sends GOOD_TOKEN gets files.

    `cut_after`: the first download of each file larger than this is cut off after so many bytes. `hold_after`: every
    download waits after so many bytes until `released` is set.
    """

    files: Mapping[str, bytes]
    gated: bool = False
    cut_after: int | None = None
    hold_after: int | None = None
    released: threading.Event = field(default_factory=threading.Event)

    @property
    def commit(self) -> str:
        names = json.dumps({name: _etag(content) for name, content in sorted(self.files.items())})
        return hashlib.sha1(names.encode()).hexdigest()


@dataclass
class Hub:
    """`downloads`: (file, Range header or "") of every GET of a file, in order. `status`: answer everything with it."""

    url: str
    repositories: dict[str, Repository]
    downloads: list[tuple[str, str]] = field(default_factory=list)
    status: int | None = None


@contextmanager
def serving_hub(repositories: Mapping[str, Repository]) -> Iterator[Hub]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    hub = server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}", dict(repositories))  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="hub")
    thread.start()
    try:
        yield hub
    finally:
        for repository in hub.repositories.values():
            repository.released.set()
        server.shutdown()
        thread.join()
        server.server_close()


def _etag(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        hub = self.server.hub  # type: ignore[attr-defined]
        assert isinstance(hub, Hub)
        return hub

    def log_message(self, format: str, *args: object) -> None:
        """Be quiet."""

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.hub.status is not None:
            return self._refuse(self.hub.status, "", "The hub has a bad day.")
        if token and token != GOOD_TOKEN:
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        for pattern, serve in ((_API, self._model), (_TREE, self._tree), (_FILE, self._file)):
            if match := pattern.fullmatch(path):
                repository = self.hub.repositories.get(match["repo"])
                if repository is None:
                    return self._refuse(404, "RepoNotFound", "Repository not found")
                if (match["revision"] or "main") not in ("main", repository.commit):
                    return self._refuse(404, "RevisionNotFound", "Invalid rev id")
                return serve(repository, match, token)
        return self._refuse(404, "", "Not found")

    def _model(self, repository: Repository, match: re.Match[str], token: str) -> None:
        siblings = [{"rfilename": name, "size": len(content)} for name, content in repository.files.items()]
        self._json({"id": match["repo"], "modelId": match["repo"], "sha": repository.commit, "siblings": siblings})

    def _tree(self, repository: Repository, match: re.Match[str], token: str) -> None:
        self._json(
            [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)[:40]}
                for name, content in repository.files.items()
            ]
        )

    def _file(self, repository: Repository, match: re.Match[str], token: str) -> None:
        if repository.gated and token != GOOD_TOKEN:
            return self._refuse(403, "GatedRepo", "Access to this repository is restricted.")
        content = repository.files.get(match["name"])
        if content is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        given = self.headers.get("Range", "")
        start = int(found[1]) if (found := re.fullmatch(r"bytes=(\d+)-", given)) else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", f'"{_etag(content)}"')
        self.send_header("X-Repo-Commit", repository.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if self.command == "GET":
            self._send_content(repository, match["name"], content, start, given)
        return None

    def _send_content(self, repository: Repository, name: str, content: bytes, start: int, given: str) -> None:
        first = all(name != other for other, _ in self.hub.downloads)
        self.hub.downloads.append((name, given))
        if repository.cut_after is not None and first and len(content) > repository.cut_after:
            self.wfile.write(content[: repository.cut_after])
            self.close_connection = True
            return
        if repository.hold_after is not None and len(content) > repository.hold_after:
            self.wfile.write(content[start : repository.hold_after])
            self.wfile.flush()
            repository.released.wait()
            start = max(start, repository.hold_after)
        try:
            self.wfile.write(content[start:])
        except ConnectionError:
            self.close_connection = True

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def _refuse(self, status: int, code: str, message: str) -> None:
        body = json.dumps({"error": message}).encode()
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", message)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)
