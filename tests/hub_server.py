"""A stand-in for the Hugging Face Hub on 127.0.0.1: the few calls that pushing and pulling make.

It keeps repositories in memory, stops by itself after two minutes, and can be told to misbehave.
"""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

LIFETIME = 120.0


@dataclass
class Repo:
    """Branch -> commit, commit -> path -> contents."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add files to a branch; return the new commit's hash."""
        whole = {**self.commits.get(self.branches.get(branch, ""), {}), **files}
        sha = hashlib.sha1(repr((len(self.commits), sorted(whole.items()))).encode()).hexdigest()
        self.commits[sha], self.branches[branch] = whole, sha
        return sha

    def find(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """The server's state, and the ways it can fail.

    Attributes:
        requests: "METHOD path" of every request so far.
        status: answer everything that starts with one of these paths with this status.
        cut: paths of files whose contents break off half way.
    """

    endpoint: str
    repos: dict[str, Repo] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    status: dict[str, int] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)

    def repo(self, name: str, files: dict[str, bytes]) -> Repo:
        """Make a repository with one commit on its main branch."""
        self.repos[name] = Repo()
        self.repos[name].commit(files)
        return self.repos[name]


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.1"
    timeout = 10

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        for start, status in hub.status.items():
            if path.startswith(start):
                return self._json({"error": "as told"}, status)
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in hub.repos
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.repos.setdefault(name, Repo(private=private))
            return self._json({"url": f"{hub.endpoint}/{name}"}, 409 if known else 200)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:5], "/".join(parts[5:]), body)
        if len(parts) > 4 and parts[2] == "resolve":
            return self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return self._json({"error": "unknown call"}, 404)

    def _api(self, name: str, call: list[str], rest: str, body: bytes) -> None:
        repo = self.server.hub.repos.get(name)
        if repo is None:
            return self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
        if call in ([], ["revision"]):
            sha = repo.find(rest or "main")
            if sha is None:
                return self._json({"error": "No such revision"}, 404, {"X-Error-Code": "RevisionNotFound"})
            files = repo.commits[sha].items()
            siblings = [{"rfilename": n, "size": len(c), "blobId": "0" * 40} for n, c in files]
            return self._json({"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": []})
        if call == ["branch"]:
            known = rest in repo.branches
            repo.branches.setdefault(rest, repo.branches.get("main", ""))
            return self._json({}, 409 if known else 200)
        if call == ["preupload"]:
            files = json.loads(body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            return self._json({"files": told})
        if call == ["commit"]:
            lines = [json.loads(line) for line in body.splitlines()]
            files = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines
                if line["key"] == "file"
            }
            sha = repo.commit(files, rest)
            url = f"{self.server.hub.endpoint}/{name}/commit/{sha}"
            return self._json({"commitUrl": url, "commitOid": sha})
        return self._json({"error": "unknown call"}, 404)

    def _resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.server.hub.repos.get(name)
        sha = repo.find(revision) if repo else None
        if repo is None or sha is None or file not in repo.commits[sha]:
            code = "EntryNotFound" if sha else "RepoNotFound"
            return self._json({"error": code}, 404, {"X-Error-Code": code})
        content = repo.commits[sha][file]
        etag = hashlib.sha256(content).hexdigest()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{etag}"')
        self.send_header("X-Repo-Commit", sha)
        self.end_headers()
        if self.command != "HEAD":
            if file in self.server.hub.cut:
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            else:
                self.wfile.write(content)

    def _json(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for key, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(key, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: Hub


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the block ends, or for two minutes."""
    server = _Server(("127.0.0.1", 0), _Handler)
    server.hub = Hub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    timer = threading.Timer(LIFETIME, server.shutdown)
    timer.daemon = True
    thread.start()
    timer.start()
    try:
        yield server.hub
    finally:
        timer.cancel()
        server.shutdown()
        server.server_close()
        thread.join(5)
