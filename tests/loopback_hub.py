"""A small Hugging Face hub on the loopback address: repositories with commits, private ones, uploads, and faults on demand."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
LARGE = (".tar", ".safetensors", ".npz", ".mp4", ".png", ".jpg")
"""Suffixes of the files that the hub keeps outside git, and names by SHA-256."""


@dataclass
class Repo:
    """Commits, the oldest first, each the content of all files by name."""

    commits: list[dict[str, bytes]]
    private: bool = False
    gated: bool = False

    def commit_id(self, number: int) -> str:
        content = repr(sorted((name, hashlib.sha256(data).hexdigest()) for name, data in self.commits[number].items()))
        return hashlib.sha1(f"{number} {content}".encode()).hexdigest()

    def find(self, revision: str) -> int | None:
        if revision == "main":
            return len(self.commits) - 1
        ids = [self.commit_id(number) for number in range(len(self.commits))]
        return ids.index(revision) if revision in ids else None


@dataclass
class LoopbackHub:
    """The hub's state, which tests change while it runs.

    Attributes:
        repos: ("model" or "dataset", user/name) → repository.
        busy: part of a path → the Retry-After of its next answers, each a 429.
        breaks: part of a path → how many of its next answers are cut in half.
        corrupt: parts of paths whose content has one byte changed.
        redirects: large files are sent from another host, as by the hub: localhost instead of 127.0.0.1.
        leaked: tokens that were sent to that host.
        requests: method, path and Range of all requests.
    """

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    busy: dict[str, list[str]] = field(default_factory=dict)
    breaks: dict[str, int] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    redirects: bool = False
    leaked: list[str] = field(default_factory=list)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    uploads: dict[str, bytes] = field(default_factory=dict)

    def add(self, repository: str, files: dict[str, bytes], kind: str = "model", **settings: bool) -> str:
        """Make a repository, or add a commit with these files to it; returns the commit."""
        repo = self.repos.setdefault((kind, repository), Repo([], **settings))
        repo.commits.append(files)
        return repo.commit_id(len(repo.commits) - 1)

    def files(self, repository: str, kind: str = "model") -> dict[str, bytes]:
        """The files of the newest commit."""
        return self.repos[kind, repository].commits[-1]

    def fetched(self, part: str) -> list[str | None]:
        """The ranges of the GET requests whose path has the part."""
        return [ranges for method, path, ranges in self.requests if method == "GET" and part in path]


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self._answer()

    def do_GET(self):
        self._answer()

    def do_POST(self):
        self._answer()

    def do_PUT(self):
        self._answer()

    def _answer(self):
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append((self.command, path, self.headers.get("Range")))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        for part, waits in self.hub.busy.items():
            if part in path and waits:
                return self._send(429, b"", {"Retry-After": waits.pop(0)})
        if path.startswith("/elsewhere/"):
            if token := self.headers.get("Authorization"):
                self.hub.leaked.append(token)
            kind, user, name, revision, file = path.removeprefix("/elsewhere/").split("/", 4)
            return self._file(self.hub.repos[kind, f"{user}/{name}"], revision, file)
        if path == "/api/repos/create":
            return self._create()
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if path.startswith("/upload/"):
            self.hub.uploads[path.removeprefix("/upload/")] = self.body
            return self._send(200, b"")
        for pattern, function in (
            (r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/(model|dataset)s/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            (r"/api/(model|dataset)s/([^/]+/[^/]+)/commit/(.+)", self._commit),
            (r"/(datasets/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            (r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ):
            if match := re.fullmatch(pattern, path):
                kind, *rest = match.groups()
                return function("dataset" if kind in ("dataset", "datasets/") else "model", *rest)
        return self._send(404, b"")

    def _repo(self, kind, repository):
        """The repository, or None after an error was sent."""
        repo = self.hub.repos.get((kind, repository))
        allowed = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if repo is None or (repo.private and not allowed):
            self._send(401 if not allowed else 404, b"", {"X-Error-Code": "RepoNotFound"})
            return None
        if repo.gated and not allowed:
            self._send(403, b"", {"X-Error-Code": "GatedRepo"})
            return None
        return repo

    def _info(self, kind, repository, revision):
        repo = self._repo(kind, repository)
        if repo is None:
            return None
        number = repo.find(revision or "main")
        if number is None:
            return self._send(404, b"", {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for name, content in repo.commits[number].items():
            entry = {"rfilename": name}
            if "blobs" in parse_qs(urlsplit(self.path).query):
                entry |= {"size": len(content), "blobId": git_sha1(content)}
                if name.endswith(LARGE):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
            siblings.append(entry)
        return self._json({"id": repository, "sha": repo.commit_id(number), "siblings": siblings, "tags": [], "private": False})

    def _resolve(self, kind, repository, revision, name):
        repo = self._repo(kind, repository)
        if repo is None:
            return None
        if self.hub.redirects and name.endswith(LARGE):
            place = self.hub.url.replace("127.0.0.1", "localhost")
            return self._send(302, b"", {"Location": f"{place}/elsewhere/{kind}/{repository}/{revision}/{name}"})
        return self._file(repo, revision, name)

    def _file(self, repo, revision, name):
        number = repo.find(revision)
        content = None if number is None else repo.commits[number].get(name)
        if content is None:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if any(part in name for part in self.hub.corrupt):
            content = bytes([content[0] ^ 1]) + content[1:]
        status, headers = 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": repo.commit_id(number)}
        if ranges := self.headers.get("Range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", ranges)[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
            status, content = 206, content[start:]
        for part, times in self.hub.breaks.items():
            if part in name and times and self.command == "GET":
                self.hub.breaks[part] -= 1
                self._send(status, content, headers, half=True)
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
        return self._send(status, content, headers)

    def _create(self):
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._send(401, b"")
        wanted = json.loads(self.body)
        name = f"{wanted['organization']}/{wanted['name']}"
        private = wanted.get("private") or wanted.get("visibility") == "private"
        repo = self.hub.repos.setdefault((wanted.get("type", "model"), name), Repo([{}], private=bool(private)))
        return self._json({"url": f"{self.hub.url}/{name}", "sha": repo.commit_id(-1)})

    def _preupload(self, kind, repository, revision):
        files = json.loads(self.body)["files"]
        modes = [("lfs" if file["path"].endswith(LARGE) else "regular", file["path"]) for file in files]
        return self._json({"files": [{"path": path, "uploadMode": mode, "shouldIgnore": False} for mode, path in modes]})

    def _batch(self, kind, repository):
        objects = json.loads(self.body)["objects"]
        for entry in objects:
            entry["actions"] = {"upload": {"href": f"{self.hub.url}/upload/{entry['oid']}"}}
        return self._json({"transfer": "basic", "objects": objects})

    def _commit(self, kind, repository, revision):
        repo = self._repo(kind, repository)
        if repo is None:
            return None
        files = dict(repo.commits[-1])
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploads[value["oid"]]
            elif item["key"] == "deletedFile":
                del files[value["path"]]
        commit = self.hub.add(repository, files, kind)
        return self._json({"commitUrl": f"{self.hub.url}/{repository}/commit/{commit}", "commitOid": commit})

    def _json(self, value):
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status, content, headers=None, *, half=False):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if half else content)
            self.wfile.flush()


def git_sha1(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serve() -> Iterator[LoopbackHub]:
    """A hub on a free port, until the end of the block."""
    hub = LoopbackHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
