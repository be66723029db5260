"""A web server on this machine with ranges, as a host of checkpoints has, that can misbehave."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field


@dataclass
class Web:
    """What the server gives, how it fails, and what it was asked."""

    files: dict[str, bytes] = field(default_factory=dict)
    url: str = ""
    tag: str | None = '"1"'
    cuts: list[int] = field(default_factory=list)
    """Bytes after which each of the next connections is cut."""
    length: bool | str = True
    """Whether the answer says how long it is, or what it says instead."""
    drips: str = ""
    """Whether its ``body`` or its ``headers`` come a byte every few milliseconds, without end."""
    asked: list[dict[str, str]] = field(default_factory=list)
    """Headers of each request."""


@contextmanager
def serving() -> Iterator[Web]:
    """Run a server."""
    web = Web()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            web.asked.append(dict(self.headers))
            data = web.files.get(self.path)
            if data is None:
                self.send_error(404)
                return
            range_, condition = self.headers.get("Range"), self.headers.get("If-Range")
            start = 0
            if range_ and condition in (None, web.tag):
                start = int(re.fullmatch(r"bytes=(\d+)-", range_)[1])
                if start >= len(data):
                    self.send_error(416)
                    return
            if web.drips:
                self._drip(b"HTTP/1.1 200 OK\r\nx: " + b"\r\n\r\n" * (web.drips == "body"))
                return
            self.send_response(206 if start else 200)
            if start:
                self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
            if web.tag:
                self.send_header("ETag", web.tag)
            if web.length:
                length = len(data) - start if web.length is True else web.length
                self.send_header("Content-Length", str(length))
            self.end_headers()
            rest = data[start:]
            self.wfile.write(rest[: web.cuts.pop(0)] if web.cuts else rest)

        def _drip(self, begin: bytes) -> None:
            self.wfile.write(begin)
            with suppress(OSError):
                while not threading.Event().wait(0.005):
                    self.wfile.write(b"x")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        web.url = f"http://127.0.0.1:{running.server_port}"
        yield web
        running.shutdown()
