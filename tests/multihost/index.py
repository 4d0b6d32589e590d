"""A package index that counts: plain HTTP in front of the index that uv uses on this machine.

It serves what that index serves, with the addresses of files changed to its own, and keeps each
file for the session. What hosts download is counted here, file by file; tests can slow it down or
make it unreachable.
"""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import Request, urlopen

from uv import find_uv_bin

_JSON = "application/vnd.pypi.simple.v1+json"
_HTML = "text/html"
_CHUNK_BYTES = 64 * 1024
_UPSTREAM_S = 60


@dataclass(frozen=True, slots=True)
class Downloaded:
    """What went out of one file: how often all of it was asked for, and all bytes of it sent.

    uv reads the metadata of a wheel by ranges where an index has none apart: that adds bytes, but
    is no download of the wheel.
    """

    count: int = 0
    n_bytes: int = 0


class UpstreamMissing(Exception):
    """This machine has no package index that uv reaches."""


def upstream_index() -> str:
    """The URL of the index that uv's own settings name here, without credentials.

    Raises:
        UpstreamMissing: uv cannot resolve a package here.
    """
    with tempfile.TemporaryDirectory() as folder:
        project = '[project]\nname = "x"\nversion = "0"\ndependencies = ["six"]\n'
        (Path(folder) / "pyproject.toml").write_text(project)
        ended = subprocess.run(
            [find_uv_bin(), "lock", "--directory", folder],
            capture_output=True,
            text=True,
            timeout=_UPSTREAM_S,
            check=False,
        )
        if ended.returncode != 0:
            raise UpstreamMissing(f"uv reaches no package index: {ended.stderr.strip()[-500:]}")
        found = re.search(r'registry = "([^"]+)"', (Path(folder) / "uv.lock").read_text())
        assert found is not None
        return found[1].rstrip("/")


class RecordingIndex:
    """Serves `url` at one address of this machine until `close`.

    Args:
        address: where it listens; hosts need a route to it.
        folder: where files are kept once they were fetched.
        upstream: the index behind it.
    """

    def __init__(self, address: str, folder: Path, upstream: str) -> None:
        self._folder, self._upstream = folder, upstream
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}
        self._sent: dict[str, dict[str, Downloaded]] = {}
        self._server: _Server | None = None
        self._at = (address, 0)
        #: The speed of each single transfer; None for as fast as it goes.
        self.bytes_per_s: float | None = None
        self.open()

    @property
    def url(self) -> str:
        """What `UV_DEFAULT_INDEX` names."""
        return f"{self.base}/simple"

    @property
    def base(self) -> str:
        return f"http://{self._at[0]}:{self._at[1]}"

    @property
    def downloads(self) -> dict[str, Downloaded]:
        """What was sent of each file, by file name, since the last `forget`."""
        total: dict[str, Downloaded] = {}
        for files in self.downloads_of.values():
            for name, sent in files.items():
                known = total.get(name, Downloaded())
                total[name] = Downloaded(known.count + sent.count, known.n_bytes + sent.n_bytes)
        return total

    @property
    def downloads_of(self) -> dict[str, dict[str, Downloaded]]:
        """The same by the address of the host that asked."""
        with self._lock:
            return {client: dict(files) for client, files in self._sent.items()}

    def forget(self) -> None:
        """Count from nothing again."""
        with self._lock:
            self._sent.clear()

    def open(self) -> None:
        """Be reachable, at the same address as before."""
        if self._server is None:
            server = _Server(self._at, _Handler)
            server.index = self
            self._at = (self._at[0], server.server_address[1])
            threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
            self._server = server

    def close(self) -> None:
        """Refuse connections, and break off those that there are."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @contextmanager
    def unreachable(self) -> Iterator[None]:
        self.close()
        try:
            yield
        finally:
            self.open()

    # -- what handlers use

    def is_open(self, server: object) -> bool:
        return self._server is server

    def count(self, client: str, name: str, *, whole: int = 0, n_bytes: int = 0) -> None:
        with self._lock:
            files = self._sent.setdefault(client, {})
            known = files.get(name, Downloaded())
            files[name] = Downloaded(known.count + whole, known.n_bytes + n_bytes)

    def page(self, path: str, accept: str) -> tuple[str, bytes]:
        """The content type and text of an index page, with the addresses of files as ours."""
        url = f"{self._upstream}/{path}"
        request = Request(url, headers={"Accept": accept or _HTML})
        with urlopen(request, timeout=_UPSTREAM_S) as answer:
            kind, body = answer.headers.get("Content-Type", _HTML), answer.read()
            url = answer.url
        if "json" in kind:
            data = json.loads(body)
            for file in data.get("files", []):
                file["url"] = self._ours(url, file["url"])
            return kind, json.dumps(data).encode()

        def changed(match: re.Match[str]) -> str:
            return f'href="{html.escape(self._ours(url, html.unescape(match[1])))}"'

        return kind, re.sub(r'href="([^"]*)"', changed, body.decode()).encode()

    def _ours(self, page: str, link: str) -> str:
        parts = urlsplit(urljoin(page, link))
        fragment = f"#{parts.fragment}" if parts.fragment else ""
        query = f"?{parts.query}" if parts.query else ""
        return f"{self.base}/files/{parts.scheme}/{parts.netloc}{parts.path}{query}{fragment}"

    def file(self, path: str) -> Path:
        """The kept copy of a file of the upstream, which is fetched if it is not there."""
        scheme, _, rest = path.partition("/")
        kept = self._folder / hashlib.sha256(path.encode()).hexdigest()
        with self._lock:
            fetching = self._fetching.setdefault(path, threading.Lock())
        with fetching:
            if not kept.exists():
                part = kept.with_suffix(".part")
                with (
                    urlopen(f"{scheme}://{rest}", timeout=_UPSTREAM_S) as answer,
                    part.open("wb") as file,
                ):
                    shutil.copyfileobj(answer, file)
                part.rename(kept)
        return kept


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    index: RecordingIndex

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A host that is killed while it downloads is what the tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 120
    server: _Server

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        index = self.server.index
        if not index.is_open(self.server):
            self.close_connection = True
            return
        where, _, path = self.path.lstrip("/").partition("/")
        try:
            if where == "simple":
                kind, body = index.page(path, self.headers.get("Accept", ""))
                self._head(200, {"Content-Type": kind}, len(body))
                if self.command == "GET":
                    self.wfile.write(body)
            elif where == "files":
                name = unquote(path.partition("?")[0].rpartition("/")[2])
                self._send(index.file(path), name)
            else:
                self._head(404, {}, 0)
        except HTTPError as exc:
            exc.close()
            self._head(exc.code, {}, 0)
        except URLError:
            self._head(502, {}, 0)

    def _head(self, code: int, headers: Mapping[str, str], length: int) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()

    def _send(self, file: Path, name: str) -> None:
        size = file.stat().st_size
        headers = {"Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        first, last = 0, size - 1
        if asked and asked[1]:
            first, last = int(asked[1]), min(int(asked[2] or last), last)
        elif asked and asked[2]:
            first = max(0, size - int(asked[2]))
        if asked:
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        self._head(206 if asked else 200, headers, last - first + 1)
        if self.command != "GET":
            return
        index, client = self.server.index, str(self.client_address[0])
        index.count(client, name, whole=not asked)
        with file.open("rb") as opened:
            opened.seek(first)
            left = last - first + 1
            while left and index.is_open(self.server):
                chunk = opened.read(min(left, _CHUNK_BYTES))
                self.wfile.write(chunk)
                index.count(client, name, n_bytes=len(chunk))
                left -= len(chunk)
                if index.bytes_per_s:
                    time.sleep(len(chunk) / index.bytes_per_s)
        self.close_connection = bool(left)
