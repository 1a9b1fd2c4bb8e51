"""A storage server on loopback that answers as Google Cloud Storage's JSON interface does.

It has what gcsfs, google-cloud-storage and TensorStore ask for: objects with generations and
preconditions, listing with delimiters and pages, simple, multipart and resumable uploads, copies.
Everything is in memory. The bucket `forbidden` refuses everyone; buckets that were not made do not
exist.

    python tests/bucket_server.py PORT BUCKET ...     # for use by hand
"""

import base64
import functools
import hashlib
import json
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

import google_crc32c

FORBIDDEN = "forbidden"
PAGE = 1000  # objects of a listing


class Refused(Exception):
    """An answer other than 200: `code`."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


class Objects:
    """The objects of all buckets.

    Attributes:
        buckets: {bucket: {name: (bytes, facts)}}.
        failing: how many of the next requests to change an object are answered by 503.
    """

    def __init__(self, *buckets: str):
        self.buckets: dict[str, dict[str, tuple[bytes, dict]]] = {name: {} for name in buckets}
        self.lock = threading.RLock()
        self.failing = 0
        self._generation = 1_700_000_000_000_000

    def of(self, bucket: str) -> dict[str, tuple[bytes, dict]]:
        if bucket == FORBIDDEN:
            raise Refused(403)
        if bucket not in self.buckets:
            raise Refused(404)
        return self.buckets[bucket]

    def get(self, bucket: str, name: str, asked: dict[str, str]) -> tuple[bytes, dict]:
        found = self.of(bucket).get(name)
        if found is None:
            raise Refused(404)
        generation = found[1]["generation"]
        if asked.get("ifGenerationMatch", generation) != generation:
            raise Refused(412)
        if asked.get("ifGenerationNotMatch") == generation:
            raise Refused(304)
        return found

    def put(self, bucket: str, name: str, data: bytes, asked: dict[str, str]) -> dict:
        with self.lock:
            if self.failing > 0:
                self.failing -= 1
                raise Refused(503)
            held = self.of(bucket)
            before = held[name][1]["generation"] if name in held else "0"
            if asked.get("ifGenerationMatch", before) != before:
                raise Refused(412)
            self._generation += 1
            now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
            checksum = google_crc32c.value(data).to_bytes(4, "big")
            facts = {
                "kind": "storage#object",
                "name": name,
                "bucket": bucket,
                "id": f"{bucket}/{name}/{self._generation}",
                "generation": str(self._generation),
                "metageneration": "1",
                "size": str(len(data)),
                "timeCreated": now,
                "updated": now,
                "contentType": "application/octet-stream",
                "storageClass": "STANDARD",
                "etag": str(self._generation),
                "md5Hash": base64.b64encode(hashlib.md5(data).digest()).decode(),
                "crc32c": base64.b64encode(checksum).decode(),
            }
            held[name] = (data, facts)
            return facts

    def delete(self, bucket: str, name: str, asked: dict[str, str]) -> None:
        with self.lock:
            self.get(bucket, name, asked)
            del self.of(bucket)[name]

    def listing(self, bucket: str, asked: dict[str, str]) -> dict[str, Any]:
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        after = asked.get("pageToken", "")
        first, end = asked.get("startOffset", ""), asked.get("endOffset", "")
        most = min(int(asked.get("maxResults", PAGE)), PAGE)
        items, prefixes = [], set()
        with self.lock:
            held = sorted(self.of(bucket).items())
        for name, (_, facts) in held:
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
            elif name > after:
                items.append(facts)
        answer: dict[str, Any] = {"kind": "storage#objects", "items": items[:most]}
        if prefixes and not after:
            answer["prefixes"] = sorted(prefixes)
        if len(items) > most:
            answer["nextPageToken"] = items[most - 1]["name"]
        return answer


class Handler(BaseHTTPRequestHandler):
    """One connection; `self.server.objects` has the objects."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self) -> None:
        url = urlsplit(self.path)
        asked = dict(parse_qsl(url.query, keep_blank_values=True))
        length = int(self.headers.get("Content-Length") or 0)
        body = self.chunked() if self.headers.get("Transfer-Encoding") else self.rfile.read(length)
        try:
            code, kind, data, headers = self.served(url.path, asked, body)
        except Refused as refused:
            code, kind, headers = refused.code, "application/json", {}
            error = {"code": code, "message": f"the server answers {code}"}
            data = b"" if code == 304 else json.dumps({"error": error}).encode()
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = answer

    def chunked(self) -> bytes:
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def served(self, path: str, asked: dict[str, str], body: bytes) -> tuple[int, str, bytes, dict]:
        server: Any = self.server
        objects: Objects = server.objects
        if path.startswith("/upload/"):
            return self.upload(path, asked, body)
        path = path.removeprefix("/download")
        if copied := re.fullmatch(
            r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewrite|copy)To/b/([^/]+)/o/([^/]+)", path
        ):
            source, name, target, new = map(unquote, copied.groups())
            facts = objects.put(target, new, objects.get(source, name, {})[0], asked)
            return self.json({"kind": "storage#rewriteResponse", "done": True, "resource": facts})
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)", path):
            bucket = unquote(found[1])
            objects.of(bucket)
            return self.json({"kind": "storage#bucket", "name": bucket, "id": bucket})
        if found := re.fullmatch(r"/storage/v1/b/([^/]+)/o", path):
            return self.json(objects.listing(unquote(found[1]), asked))
        if not (found := re.fullmatch(r"/storage/v1/b/([^/]+)/o/(.+)", path)):
            raise Refused(404)
        bucket, name = unquote(found[1]), unquote(found[2])
        if self.command == "DELETE":
            objects.delete(bucket, name, asked)
            return 204, "application/json", b"", {}
        data, facts = objects.get(bucket, name, asked)
        if asked.get("alt") != "media":
            return self.json(facts)
        headers = {
            "X-Goog-Generation": facts["generation"],
            "X-Goog-Hash": f"crc32c={facts['crc32c']},md5={facts['md5Hash']}",
        }
        if wanted := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            if not wanted[1]:
                first, last = max(len(data) - int(wanted[2]), 0), len(data) - 1
            else:
                first = int(wanted[1])
                last = min(int(wanted[2] or len(data)), len(data) - 1)
            if first >= len(data):
                raise Refused(416)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            return 206, "application/octet-stream", data[first : last + 1], headers
        return 200, "application/octet-stream", data, headers

    def upload(self, path: str, asked: dict[str, str], body: bytes) -> tuple[int, str, bytes, dict]:
        server: Any = self.server
        bucket = unquote(re.fullmatch(r"/upload/storage/v1/b/([^/]+)/o", path)[1])
        if asked.get("uploadType") == "multipart":
            boundary = re.search(r"boundary=[\"']?([^\"';]+)", self.headers["Content-Type"])[1]
            _, about, part, _ = body.split(f"--{boundary}".encode())
            about, data = (re.split(rb"\r?\n\r?\n", p, maxsplit=1)[1] for p in (about, part))
            name = asked.get("name") or json.loads(about)["name"]
            data = data.removesuffix(b"\r\n" if b"\r\n" in body[:200] else b"\n")
            return self.json(server.objects.put(bucket, name, data, asked))
        if asked.get("uploadType") == "resumable" and "upload_id" not in asked:
            name = asked.get("name") or json.loads(body)["name"]
            server.objects.of(bucket)
            with server.objects.lock:
                session = str(len(server.sessions))
                server.sessions[session] = (name, b"", asked)
            host = self.headers["Host"]
            where = (
                f"http://{host}{path}?uploadType=resumable&name={quote(name)}&upload_id={session}"
            )
            return 200, "application/json", b"{}", {"Location": where}
        if "upload_id" in asked:
            name, held, began = server.sessions[asked["upload_id"]]
            held += body
            server.sessions[asked["upload_id"]] = (name, held, began)
            if self.headers.get("Content-Range", "").endswith("/*"):
                return 308, "application/json", b"", {"Range": f"bytes=0-{len(held) - 1}"}
            return self.json(server.objects.put(bucket, name, held, began))
        return self.json(server.objects.put(bucket, asked["name"], body, asked))

    @staticmethod
    def json(content: Any) -> tuple[int, str, bytes, dict]:
        return 200, "application/json", json.dumps(content).encode(), {}


class Server(ThreadingHTTPServer):
    """The server; `address` is what clients are given."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, port: int, *buckets: str):
        super().__init__(("127.0.0.1", port), Handler)
        self.objects = Objects(*buckets)
        self.sessions: dict[str, tuple[str, bytes, dict]] = {}
        self.address = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed is no error of the server."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    @property
    def environment(self) -> dict[str, str]:
        """What points the clients to this server."""
        return {
            "STORAGE_EMULATOR_HOST": self.address,
            "TENSORSTORE_GCS_HTTP_URL": self.address,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GOOGLE_CLOUD_PROJECT": "project",
            "FSSPEC_GCS_TOKEN": "anon",
        }


@functools.cache
def server_of_this_process() -> Server:
    """A server that lives as long as this process, whose clients read their environment once."""
    server = Server(0, "bucket")
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    os.environ.update(server.environment)
    return server


@contextmanager
def serving(*buckets: str) -> Iterator[Server]:
    """A server in a thread of this process."""
    with Server(0, *buckets) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


if __name__ == "__main__":
    Server(int(sys.argv[1]), *sys.argv[2:]).serve_forever()
