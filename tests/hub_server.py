"""A small local Hub: as much of its HTTP protocol as `huggingface_hub` needs to push and download model repositories.

It checks what the real one checks (the token, hashes and sizes of large files, metadata of model cards) and keeps
every commit, so that a test sees what would have been uploaded, file by file.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

TOKEN, USER = "hf_test", "tester"
LARGE_FILES = re.compile(r".*\.(safetensors|bin|pt|parquet|png)")  # as in the .gitattributes of a new repository
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Commit:
    """One commit: its message, the files it wrote, and all files of the repository after it."""

    message: str
    written: list[str]
    files: dict[str, bytes]
    oid: str


@dataclass
class Hub:
    """What the server knows.

    Args:
        url: its endpoint.
        repos: commits of every repository, the oldest first.
        large: content of large files by SHA-256.
        refused: requests that were answered with an error other than "not found".
    """

    url: str = ""
    repos: dict[str, list[Commit]] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def files(self, repo: str) -> dict[str, bytes]:
        """The files of a repository now."""
        return self.repos[repo][-1].files if self.repos[repo] else {}


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A server on a free port, running while the context lasts."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class HubHandler(BaseHTTPRequestHandler):
    """The requests of `huggingface_hub`; everything else is "not found"."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    # ---------------------------------------------------------------- answers

    def answer(self, content: dict | list | bytes, status: int = HTTPStatus.OK, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, message: str, code: str | None = None) -> None:
        if status != HTTPStatus.NOT_FOUND:
            self.hub.refused.append(f"{self.command} {self.path}: {message}")
        self.answer({"error": message}, status, **({"X_Error_Code": code} if code else {}))

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    # ---------------------------------------------------------------- requests

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if path == "/api/whoami-v2":
            return self.answer({"type": "user", "name": USER, "orgs": []}) if self.signed() else None
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self.resolve(*match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/[^/]+)?", path):
            return self.model_info(match[1])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(?:/(.+))?", path):
            return self.tree(match[1], match[2])
        self.refuse(HTTPStatus.NOT_FOUND, "no such page", "EntryNotFound")

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, body = unquote(urlsplit(self.path).path), self.body()
        if not self.signed():
            return
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if path == "/api/validate-yaml":
            return self.validate(json.loads(body)["content"])
        if match := re.fullmatch(r"/api/models/(.+)/preupload/main", path):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if LARGE_FILES.fullmatch(file["path"]) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": files}) if self.exists(match[1]) else None
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body)) if self.exists(match[1]) else None
        if match := re.fullmatch(r"/api/models/(.+)/commit/main", path):
            return self.commit(match[1], body) if self.exists(match[1]) else None
        if path == "/verify":
            stored = json.loads(body)
            known = len(self.hub.large.get(stored["oid"], b"")) == stored["size"]
            return self.answer({}) if known else self.refuse(HTTPStatus.BAD_REQUEST, "not uploaded")
        self.refuse(HTTPStatus.NOT_FOUND, "no such page")

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path.removeprefix("/large/")
        if hashlib.sha256(content).hexdigest() != oid:
            return self.refuse(HTTPStatus.BAD_REQUEST, "the content does not have the hash that was announced")
        self.hub.large[oid] = content
        self.answer({})

    def signed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.refuse(HTTPStatus.UNAUTHORIZED, "no token, or a wrong one")
        return False

    def exists(self, repo: str) -> bool:
        if repo in self.hub.repos:
            return True
        self.refuse(HTTPStatus.NOT_FOUND, "no such repository", "RepoNotFound")
        return False

    # ---------------------------------------------------------------- upload

    def create(self, request: dict) -> None:
        repo = f"{request.get('organization') or USER}/{request['name']}"
        if repo in self.hub.repos:
            status = HTTPStatus.CONFLICT
        else:
            status, self.hub.repos[repo] = HTTPStatus.OK, []
        self.answer({"url": f"{self.hub.url}/{repo}", "name": repo, "id": repo}, status)

    def validate(self, card: str) -> None:
        values = yaml.safe_load(card.split("---")[1])
        ids = {name: values.get(name) for name in ("base_model", "datasets") if values.get(name)}
        listed = {name: value if isinstance(value, list) else [value] for name, value in ids.items()}
        errors = [
            {"message": f'"{name}" with value "{value}" is not valid.'}
            for name, given in listed.items()
            for value in given
            if not HUB_ID.fullmatch(value)
        ]
        if errors:
            self.hub.refused.append(str(errors))
        self.answer({"errors": errors, "warnings": []}, HTTPStatus.BAD_REQUEST if errors else HTTPStatus.OK)

    def batch(self, request: dict) -> None:
        objects = []
        for wanted in request["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/large/{wanted['oid']}", "header": {}}}
            actions["verify"] = {"href": f"{self.hub.url}/verify", "header": {}}
            stored = wanted["oid"] in self.hub.large
            objects.append({"oid": wanted["oid"], "size": wanted["size"], **({} if stored else {"actions": actions})})
        self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repo: str, body: bytes) -> None:
        files, written, message = dict(self.hub.files(repo)), [], ""
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "header":
                message = value["summary"]
                continue
            written.append(value["path"])
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile" and value["oid"] in self.hub.large:
                files[value["path"]] = self.hub.large[value["oid"]]
            else:
                return self.refuse(HTTPStatus.BAD_REQUEST, f"cannot commit {value['path']}")
        oid = hashlib.sha1(f"{repo} {len(self.hub.repos[repo])}".encode()).hexdigest()
        self.hub.repos[repo].append(Commit(message, sorted(written), files, oid))
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    # ---------------------------------------------------------------- download

    def resolve(self, repo: str, revision: str, name: str) -> None:
        if not self.exists(repo):
            return
        content = self.hub.files(repo).get(name)
        if content is None:
            return self.refuse(HTTPStatus.NOT_FOUND, "no such file", "EntryNotFound")
        etag = hashlib.sha256(content).hexdigest()
        self.answer(content, ETag=f'"{etag}"', X_Repo_Commit=self.hub.repos[repo][-1].oid)

    def model_info(self, repo: str) -> None:
        if self.exists(repo):
            names = [{"rfilename": name} for name in self.hub.files(repo)]
            commits = self.hub.repos[repo]
            self.answer({"id": repo, "sha": commits[-1].oid if commits else None, "siblings": names})

    def tree(self, repo: str, folder: str | None) -> None:
        if not self.exists(repo):
            return
        files = {n: c for n, c in self.hub.files(repo).items() if folder is None or n.startswith(f"{folder}/")}
        if folder is not None and not files:
            return self.refuse(HTTPStatus.NOT_FOUND, "no such folder", "EntryNotFound")
        self.answer(
            [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
        )
