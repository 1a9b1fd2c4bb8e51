"""A small Hugging Face hub on loopback: repositories of models, commits, downloads.

It knows the part of the protocol that huggingface_hub's create_repo, upload_folder and
snapshot_download use, and keeps files in memory. As a program, `python -m tests.hub_server FILE`
serves until it is stopped, and writes its address to FILE.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class Hub(ThreadingHTTPServer):
    """The server.

    Attributes:
        files: content by name of the file, by name of the repository.
        token: that a request which writes must have; "": none.
    """

    daemon_threads = True

    def __init__(self, token: str = ""):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files: dict[str, dict[str, bytes]] = {}
        self.token = token

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def revision(self, repository: str) -> str:
        names = sorted(self.files[repository].items())
        return hashlib.sha1(repr(names).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        """Prints nothing."""

    def _answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _repository(self, parts: list[str]) -> str:
        return "/".join(parts[:2])

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.partition("?")[0]
        hub, parts = self.server, path.strip("/").split("/")
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = (
                asked["name"]
                if "/" in asked["name"]
                else f"{asked['organization']}/{asked['name']}"
            )
            status = 409 if name in hub.files else 200
            hub.files.setdefault(name, {})
            self._answer({"url": f"{hub.url}/{name}", "id": name}, status)
        elif path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif parts[:2] == ["api", "models"] and parts[4] == "preupload":
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
                for f in json.loads(body)["files"]
            ]
            self._answer({"files": files})
        elif parts[:2] == ["api", "models"] and parts[4] == "commit":
            name = self._repository(parts[2:])
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    value = entry["value"]
                    hub.files[name][value["path"]] = base64.b64decode(value["content"])
            oid = hub.revision(name)
            self._answer({"commitOid": oid, "commitUrl": f"{hub.url}/{name}/commit/{oid}"})
        else:
            self._answer({"error": f"no {path}"}, 404)

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        parts = path.strip("/").split("/")
        of_api = parts[:2] == ["api", "models"]
        name = self._repository(parts[2:] if of_api else parts)
        if name not in hub.files:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        elif of_api and (len(parts) == 4 or parts[4] == "revision"):
            siblings = [{"rfilename": file} for file in hub.files[name]]
            self._answer({"id": name, "sha": hub.revision(name), "siblings": siblings})
        elif of_api and parts[4] == "tree":
            entries = [
                {
                    "type": "file",
                    "path": file,
                    "size": len(content),
                    "oid": hashlib.sha1(content).hexdigest(),
                }
                for file, content in hub.files[name].items()
            ]
            self._answer(entries)
        elif len(parts) > 4 and parts[2] == "resolve" and "/".join(parts[4:]) in hub.files[name]:
            content = hub.files[name]["/".join(parts[4:])]
            tag = f'"{hashlib.sha1(content).hexdigest()}"'
            self._answer(content, ETag=tag, X_Repo_Commit=hub.revision(name))
        else:
            self._answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")

    do_HEAD = do_GET


@contextmanager
def running(token: str = "") -> Iterator[Hub]:
    """A hub that serves while the context lasts."""
    hub = Hub(token)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


if __name__ == "__main__":
    server = Hub()
    ready = Path(sys.argv[1])
    ready.with_suffix(".tmp").write_text(server.url)
    ready.with_suffix(".tmp").rename(ready)
    server.serve_forever()
