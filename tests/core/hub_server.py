"""A hub on this machine: the endpoints that huggingface_hub speaks to make repositories, commit, and download."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote


@dataclass
class Repository:
    """Branches to commits, commits to files; like git, nothing in a commit ever changes."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})

    def commit(self, branch: str, changes: dict[str, bytes]) -> str:
        files = {**self.commits[self.branches[branch]], **changes}
        name = hashlib.sha1(repr((self.branches[branch], sorted(files.items()))).encode()).hexdigest()
        self.commits[name] = files
        self.branches[branch] = name
        return name

    def at(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)


@dataclass
class HubServer:
    """`address` serves `repositories`; `token` may see the private ones and write. `requests` keeps what was asked."""

    token: str = "secret"
    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    short_by: int = 0  # bytes that a download lacks at its end

    def __post_init__(self) -> None:
        hub = self

        class Handler(Answers):
            server_hub = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def damage(self, repo: str, name: str, data: bytes) -> None:
        """Commit other bytes for a file."""
        self.repositories[repo].commit("main", {name: data})


class Answers(BaseHTTPRequestHandler):
    """One answer per request of the client library."""

    server_hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.server_hub, unquote(self.path.partition("?")[0])
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub.requests.append((self.command, path))
        allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
        if path == "/api/repos/create":
            return self._create(json.loads(body), allowed)
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+)/(\w+)/([^/]+)(?:/(.+))?", path):
            repo, verb, revision, name = found.groups()
            repository = hub.repositories.get(repo)
            if repository is None or (repository.private and not allowed):
                return self._error(401 if not allowed else 404, "RepoNotFound", "Repository not found")
            if verb in ("commit", "preupload", "branch") and not allowed:
                return self._error(403, "Forbidden", "this token may not write")
            if verb == "branch":
                repository.branches.setdefault(revision, repository.branches["main"])
                return self._json({}, 201)
            commit = repository.at(revision)
            if commit is None:
                return self._error(404, "RevisionNotFound", "Revision not found")
            if verb == "preupload":
                files = [
                    {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for file in json.loads(body)["files"]
                ]
                return self._json({"files": files})
            if verb == "commit":
                lines = [json.loads(line) for line in body.splitlines() if line.strip()]
                changes = {
                    line["value"]["path"]: base64.b64decode(line["value"]["content"])
                    for line in lines
                    if line["key"] == "file"
                }
                made = repository.commit(revision, changes)
                return self._json({"commitOid": made, "commitUrl": f"{hub.address}/{repo}/commit/{made}"})
            if verb == "resolve":
                return self._file(repository, commit, name)
        return self._error(404, "", f"no endpoint {self.command} {path}")

    def _create(self, asked: dict[str, Any], allowed: bool) -> None:
        if not allowed:
            return self._error(401, "", "Invalid username or password")
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        private = bool(asked.get("private") or asked.get("visibility") == "private")
        self.server_hub.repositories.setdefault(name, Repository(private=private))
        return self._json({"url": f"{self.server_hub.address}/{name}"})

    def _file(self, repository: Repository, commit: str, name: str) -> None:
        data = repository.commits[commit].get(name)
        if data is None:
            return self._error(404, "EntryNotFound", f"{name} not found", commit)
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data[: len(data) - self.server_hub.short_by])
        return None

    def _json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, text: str, commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": text, "X-Repo-Commit": commit}
        self._send(status, json.dumps({"error": text}).encode(), {k: v for k, v in headers.items() if v})

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
