"""A model hub on loopback, as small as the real client allows: `with HubServer({"org/name": Repo(files)}) as hub: …`

Routes (as of huggingface_hub 0.30 to 2.4, without xet):
    GET       /api/models/ID[/revision/REV]     the commit and the list of files
    GET       /api/models/ID/tree/COMMIT        the files with their sizes
    POST      /api/models/ID/paths-info/COMMIT  the same for some files
    HEAD, GET /ID/resolve/REV/FILE              a small file; a large one (*.safetensors) redirects to the other host
    GET       /cdn/SHA256                       a large file, from "localhost" as the other host
`HubServer.requests` holds every request as "METHOD path", so that a test can tell what was fetched; `HubServer.sent` is how
many bytes of large files that were.
"""

import hashlib
import json
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Repo:
    files: dict[str, bytes]
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    moves_to: str | None = None  # main is this commit from the second question on
    gated: bool = False  # as on the real hub: anyone may list the files, none may be read
    private: bool = False
    status: int | None = None  # answer everything with this status
    truncate: str | None = None  # this file ends after half of its bytes, at every attempt
    slow: str | None = None  # this file trickles for a minute


class HubServer:
    def __init__(self, repos: dict[str, Repo]) -> None:
        self.repos = repos
        self.requests: list[str] = []
        self.sent = 0  # bytes of large files
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"
        self.cdn = f"http://localhost:{self._http.server_port}/cdn"

    def __enter__(self) -> "HubServer":
        threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    def fetched(self) -> list[str]:
        """The names of the files whose bytes were asked for, sorted."""
        gets = [line for line in self.requests if line.startswith("GET")]
        names = {line.split("/resolve/")[1].split("/", 1)[1] for line in gets if "/resolve/" in line}
        large = {line.rsplit("/", 1)[1] for line in gets if "/cdn/" in line}
        for repo in self.repos.values():
            names |= {name for name, data in repo.files.items() if _is_large(name) and _sha(data) in large}
        return sorted(names)


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        if path.startswith("/cdn/"):
            return self._cdn(path.rsplit("/", 1)[1])
        parts = path.removeprefix("/api/models").strip("/").split("/")
        name, route = "/".join(parts[:2]), parts[2:]
        repo = self.hub.repos.get(name)
        if self.headers.get("Authorization") == "Bearer hf_wrong":
            return self._error(401, None, "Invalid credentials in Authorization header")
        if repo is None or repo.private:
            return self._error(401, "RepoNotFound", "Repository not found")
        if repo.status is not None:
            return self._error(repo.status, None, "told to fail")
        kind, revision, rest = [*route, "revision", "main", ""][:3] if not route else [*route, ""][:3]
        commit = revision if revision in repo.revisions.values() else repo.revisions.get(revision)
        if repo.moves_to is not None:
            repo.revisions["was"], repo.revisions["main"] = COMMIT, repo.moves_to
        if commit is None:
            return self._error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        if kind == "revision":
            siblings = [{"rfilename": file} for file in repo.files]
            return self._json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})
        if kind == "tree":
            return self._json([_entry(file, data) for file, data in repo.files.items()])
        if kind == "paths-info":
            wanted = json.loads(body)["paths"] if body[:1] == b"{" else parse_qs(body.decode())["paths"]
            return self._json([_entry(file, repo.files[file]) for file in wanted if file in repo.files])
        return self._resolve(repo, commit, "/".join([rest, *route[3:]]))

    def _resolve(self, repo: Repo, commit: str, file: str) -> None:
        if repo.gated:
            return self._error(403, "GatedRepo", "Access to this model is restricted")
        if file not in repo.files:
            return self._error(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        data = repo.files[file]
        if not _is_large(file):
            return self._send(200, data, {"X-Repo-Commit": commit, "ETag": f'"{_oid(data)}"'})
        headers = {
            "Location": f"{self.hub.cdn}/{_sha(data)}",
            "X-Repo-Commit": commit,
            "X-Linked-ETag": f'"{_sha(data)}"',
            "X-Linked-Size": str(len(data)),
        }
        self._send(302, b"", headers)

    def _cdn(self, sha: str) -> None:
        repo, file, data = next(
            (repo, file, data)
            for repo in self.hub.repos.values()
            for file, data in repo.files.items()
            if _sha(data) == sha
        )
        start, end = 0, len(data)
        if self.headers.get("Range"):
            first, _, last = self.headers["Range"].removeprefix("bytes=").partition("-")
            start, end = int(first), min(end, int(last) + 1) if last else end
        headers = {"ETag": f'"{sha}"', "Accept-Ranges": "bytes", "Content-Disposition": f'inline; filename="{file}";'}
        if start or end < len(data):
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        half = len(data) // 2
        if file == repo.truncate:
            sent = data[start:half]
        elif file == repo.slow:
            sent = data[start : start + 1000]
        else:
            sent = data[start:end]
        self.hub.sent += len(sent)
        self._send(206 if "Content-Range" in headers else 200, sent, headers, length=end - start)
        if file == repo.slow:
            time.sleep(60)
        if len(sent) < end - start:
            self.close_connection = True

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str | None, message: str, headers: dict[str, str] | None = None) -> None:
        headers = {"X-Error-Message": message, **(headers or {})}
        if code is not None:
            headers["X-Error-Code"] = code
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
            self.wfile.flush()


def _entry(file: str, data: bytes) -> dict[str, object]:
    entry: dict[str, object] = {"type": "file", "path": file, "size": len(data), "oid": _oid(data)}
    if _is_large(file):
        entry["lfs"] = {"oid": _sha(data), "size": len(data), "pointerSize": 134}
    return entry


def _is_large(file: str) -> bool:
    return file.endswith(".safetensors")


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
