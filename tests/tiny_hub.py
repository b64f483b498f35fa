"""A model hub in miniature: serves folders the way huggingface.co does, as far as transformers and datasets ask.

Models lie at ROOT/OWNER/NAME, datasets at ROOT/datasets/OWNER/NAME. Tests get one as the fixture `hub`.
"""

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

COMMIT = "0" * 40


class Hub(ThreadingHTTPServer):
    """Listens on a free port of this machine: `endpoint` is what HF_ENDPOINT must be."""

    def __init__(self, root: Path) -> None:
        super().__init__(("127.0.0.1", 0), Answer)
        self.root = root
        self.endpoint = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    """/REPO/resolve/REVISION/FILE is a file, /api/{models,datasets}/REPO a description, its /tree/ the files."""

    server: Hub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path).strip("/")
        if "/resolve/" in path:
            repo, rest = path.split("/resolve/")
            self.file(repo, rest.partition("/")[2])
        elif path.startswith(("api/models/", "api/datasets/")):
            kind, owner, name, *rest = path.split("/")[1:]
            self.about(f"{owner}/{name}" if kind == "models" else f"datasets/{owner}/{name}", rest[:1] == ["tree"])
        else:
            self.send(404)

    do_HEAD = do_GET

    def file(self, repo: str, name: str) -> None:
        folder = self.server.root / repo
        if not (folder / name).is_file():
            self.send(404, **{"X-Error-Code": "EntryNotFound" if folder.is_dir() else "RepoNotFound"})
            return
        data = (folder / name).read_bytes()
        headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        wanted = self.headers.get("Range")
        if wanted is None or self.command == "HEAD":
            self.send(200, data, **headers)
            return
        first, _, last = wanted.removeprefix("bytes=").partition("-")
        end = min(int(last or len(data)), len(data) - 1)
        self.send(206, data[int(first) : end + 1], **headers, **{"Content-Range": f"bytes {first}-{end}/{len(data)}"})

    def about(self, repo: str, tree: bool) -> None:
        folder = self.server.root / repo
        if not folder.is_dir():
            self.send(404, **{"X-Error-Code": "RepoNotFound"})
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [str(path.relative_to(folder)) for path in files]
        entries = [
            {"type": "file", "path": name, "size": path.stat().st_size, "oid": COMMIT}
            for name, path in zip(names, files, strict=True)
        ]
        info = {"id": repo.removeprefix("datasets/"), "sha": COMMIT, "private": False, "gated": False, "tags": []}
        info["siblings"] = [{"rfilename": name} for name in names]
        self.send(200, json.dumps(entries if tree else info).encode(), **{"Content-Type": "application/json"})

    def send(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the test's stderr clean."""
