"""Download a checkpoint once: resume interrupted downloads, verify, then give it its name."""

import hashlib
import os
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from email.message import Message
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from pathlib import Path
from urllib.parse import urldefrag, urlparse

import torch

from cxrdist.errors import CxrdistError
from cxrdist.files import open_regular, read_bytes, room_for, sha256_of, waiting_lock
from cxrdist.model.tensorfile import container_of
from cxrdist.terminal import progress

ATTEMPTS = 5  # connections per call; the next call resumes
TIMEOUT_SECONDS = 30  # without a byte
SLOW_SECONDS = 60  # limit for the headers, and the period over which the rate is averaged
LEAST_BYTES_PER_SECOND = 1000  # anything slower is malicious or broken
_MOST_NAME_BYTES = 150  # file systems allow 255; prefixes and suffixes are added to the name
_MOST_NOTE_BYTES = 1000
_CHUNK_BYTES = 1 << 20
# PyTorch's hub convention: a name that ends in the first digits of the file's sha256.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.[\w.]+$")


class _BrokenOffError(Exception):
    """The connection ended before the file did."""


def download(url: str, where: str) -> Path:
    """Return a checkpoint in the cache of torch.hub; download it if it is not there.

    It is checked against the sha256 in its name or after ``#sha256=`` in the URL; without either,
    against the one noted when it was downloaded. Interrupted downloads are kept, and the next call
    resumes them.

    Raises:
        CxrdistError: the host cannot be reached, or the file is not the published one. The message
            begins with `where`, the option and its value.
    """
    digits = re.search(r"#sha256=([0-9a-f]{8,64})$", url)
    if not _is_web(url) or ("#" in url and not digits):
        raise CxrdistError(
            f"{where}: expected http(s)://HOST/FILE, optionally with #sha256=DIGITS at its end"
        )
    url, _ = urldefrag(url)
    file = place_of(url)
    in_name = _HASH_IN_NAME.search(file.name)
    expected = digits.group(1) if digits else in_name.group(1) if in_name else None
    with room_for(file, "set TORCH_HOME to a directory that you can write to"):
        file.parent.mkdir(parents=True, exist_ok=True)
    note = file.with_name(file.name + ".sha256")
    # Another process, perhaps on another node, may fetch the same file.
    with waiting_lock(file.with_name(f".{file.name}.lock")):
        if file.is_file():
            if expected is None and note.is_file():
                expected = _noted(note)
            _accepted(file, expected, f"{where}: {file}, fetched before,")
            return file
        partial = file.with_name(file.name + ".partial")
        try:
            _fetch(url, partial, checked=expected is not None)
        except (OSError, HTTPException, _BrokenOffError) as error:
            raise CxrdistError(
                f"{where}: {url} could not be fetched ({_reason(error)}); run the same "
                f"command again to resume, or fetch it on a machine with internet "
                f"(curl -L -o {file.name} {url}) and put it at {file}"
            ) from error
        sha256 = _accepted(partial, expected, f"{where}: the file from {url}")
        with room_for(file):
            # The note first: a file under its final name is checked against it.
            note.write_text(f"{sha256}  {file.name}\n")
            partial.replace(file)
    return file


def _is_web(url: str) -> bool:
    """Return whether a URL is valid, with http or https and a host."""
    try:
        parsed = urlparse(url)
        is_web = parsed.scheme in ("http", "https") and bool(parsed.hostname)
        # urlparse rejects a port of 99999 or a host that begins with a bracket; idna rejects a..b.
        return is_web and parsed.port != 0 and bool(parsed.netloc.encode("idna"))
    except ValueError:
        return False


def _noted(note: Path) -> str:
    """Return the sha256 in a note; raise CxrdistError if the note is damaged."""
    digits = re.match(rb"[0-9a-f]{64}\b", read_bytes(note, _MOST_NOTE_BYTES))
    if digits is None:
        raise CxrdistError(f"{note}: is not a sha256; remove it and the file that it belongs to")
    return digits[0].decode()


def place_of(url: str) -> Path:
    """Return the path of a URL's file in the cache of torch.hub.

    A hash of the URL is added unless the name contains one: two URLs may end in the same name.
    """
    name = Path(urlparse(url).path).name or "weights"
    if not _HASH_IN_NAME.search(name):
        name = f"{hashlib.sha256(os.fsencode(url)).hexdigest()[:8]}.{name}"
    # The end of the name is kept, for its suffix and the digits of its hash.
    name = os.fsdecode(os.fsencode(name)[-_MOST_NAME_BYTES:])
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _accepted(file: Path, expected: str | None, what: str) -> str:
    """Return the sha256 of a file; remove one that is not the published one, and raise an error."""
    sha256 = sha256_of(file)
    if expected is not None and not sha256.startswith(expected):
        problem = f"has the sha256 {sha256}, expected {expected}"
    elif container_of(file) is None:
        problem = "is not a checkpoint (a web page?)"
    else:
        return sha256
    file.unlink()
    raise CxrdistError(f"{what} {problem}; it was removed. Run the same command again to fetch it")


def _fetch(url: str, partial: Path, *, checked: bool) -> None:
    """Fetch a file, over several connections if needed; raise an error if all broke off."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            _fetch_rest(url, partial, checked=checked)
            return
        except _BrokenOffError:
            if attempt == ATTEMPTS:
                raise
        except urllib.error.HTTPError as error:
            # 416: the file on the server is not longer than the partial one, so start again.
            if error.code != 416 or attempt == ATTEMPTS:
                raise
            partial.unlink(missing_ok=True)


def _fetch_rest(url: str, partial: Path, *, checked: bool) -> None:
    """Fetch the missing bytes in one connection, or all bytes if the file may have changed."""
    version = partial.with_name(partial.name + ".version")
    done = partial.stat().st_size if partial.is_file() else 0
    known = _known_version(version) if done else ""
    # A compressed answer would have other bytes and another length than the file.
    headers = {"User-Agent": "cxrdist", "Accept-Encoding": "identity"}
    if done and (known or checked):
        headers["Range"] = f"bytes={done}-"
    if done and known:
        # If its version is another, the server sends the whole file, with status 200.
        headers["If-Range"] = known
    request = urllib.request.Request(url, headers=headers)
    opener = urllib.request.build_opener(_Opener)
    with opener.open(request, timeout=TIMEOUT_SECONDS) as response:
        if response.status == 206 and not response.headers.get("Content-Range", "").startswith(
            f"bytes {done}-"
        ):
            raise OSError("the server sent another range of bytes than requested")
        done = done if response.status == 206 else 0
        length = response.headers.get("Content-Length", "")
        if not re.fullmatch(r"\d{0,18}", length):
            raise OSError(f"the server sent the length {length:.20}")
        total = done + int(length) if length else None
        title = f"fetching {Path(urlparse(url).path).name}"
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if done else os.O_TRUNC)
        with (
            room_for(partial, "set TORCH_HOME to a directory with room"),
            open_regular(partial, flags) as out,
            progress(total, title, "B", done=done) as bar,
        ):
            # Only now that `open_regular` has removed the bytes of another version.
            version.write_text(_version(response.headers))
            for chunk in _chunks(response):
                out.write(chunk)
                bar.update(len(chunk))
            if total is not None and out.tell() != total:
                raise _BrokenOffError(f"it broke off after {out.tell()} of {total} bytes")
    version.unlink(missing_ok=True)


def _chunks(response: HTTPResponse) -> Iterator[bytes]:
    """Yield the bytes of a response as they arrive; raise HTTPException if that is too slow."""
    began, count = time.monotonic(), 0
    while True:
        try:
            # Not `read`, which waits for a whole chunk before the rate is checked.
            chunk = response.read1(_CHUNK_BYTES)
        except (OSError, HTTPException) as error:
            raise _BrokenOffError(f"it broke off ({_reason(error)})") from error
        if not chunk:
            return
        yield chunk
        count += len(chunk)
        seconds = time.monotonic() - began
        if seconds > SLOW_SECONDS:
            if count < LEAST_BYTES_PER_SECOND * seconds:
                raise HTTPException(f"the server sent {count} bytes in {seconds:.0f} s")
            began, count = time.monotonic(), 0


class _WithDeadline(HTTPConnection):
    """A connection with a deadline for the headers; a socket timeout restarts with each byte."""

    def getresponse(self) -> HTTPResponse:
        late = threading.Event()
        timer = threading.Timer(SLOW_SECONDS, self._cut, [late])
        timer.start()
        try:
            response = super().getresponse()
        finally:
            timer.cancel()
        if late.is_set():  # headers that were cut off look like complete ones
            raise TimeoutError(f"the server took more than {SLOW_SECONDS:g} s for its headers")
        return response

    def _cut(self, late: threading.Event) -> None:
        late.set()
        with suppress(OSError, AttributeError):  # the connection has already ended
            self.sock.shutdown(socket.SHUT_RDWR)


class _SecureWithDeadline(_WithDeadline, HTTPSConnection):
    """The same with TLS."""


class _Opener(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """Opens connections with a deadline, for `urllib.request.build_opener`."""

    def http_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_WithDeadline, request)

    def https_open(self, request: urllib.request.Request) -> HTTPResponse:
        return self.do_open(_SecureWithDeadline, request)


def _known_version(note: Path) -> str:
    """Return the version of a partial file, as given by `_version`; empty if not known."""
    if not note.is_file():
        return ""
    text = read_bytes(note, _MOST_NOTE_BYTES).decode("latin-1")
    return text if text.isprintable() else ""


def _version(headers: Message) -> str:
    """Return the version of the URL's content: a strong ETag, or else Last-Modified."""
    # If-Range takes no weak ETag (RFC 9110, section 13.1.5).
    tag = headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else headers.get("Last-Modified", "")


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", None) or error
    return " ".join(str(reason).split())
