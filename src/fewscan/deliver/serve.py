"""A report served to this machine's own browser, for scans too large to lie in a page.

Only 127.0.0.1 is listened on, every address starts with a random token, the Host header must be ours (so that a page
elsewhere cannot reach in by rebinding a name), and there is no way from an address to a file: a request names a scene
and a layer by their numbers or is refused with 403.
"""

from __future__ import annotations

import hmac
import json
import re
import secrets
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock
from typing import Any

from fewscan.deliver import viewer
from fewscan.deliver.embedding import Packed, packed
from fewscan.deliver.report import page_of, parts_of, read_run
from fewscan.deliver.scenes import Content, Scene, said, scenes
from fewscan.errors import ConfigError, DataError, FewscanError

HOST = "127.0.0.1"
HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
SCENE, LAYER = re.compile(r"scene/(\d{1,6})"), re.compile(r"layer/(\d{1,6})/(\d{1,6})")
SCRIPT = """
const served = async (place) => (await fetch(place)).json();
const servedBytes = async (place) => new Uint8Array(await (await fetch(place)).arrayBuffer());
"""
Answer = tuple[str, bytes]  # type and content


class Pages:
    """What can be asked for; the scene asked for last is kept in memory.

    Parameters
    ----------
    page : str
        The report.
    listed : sequence of Scene
        Of its viewer.
    """

    def __init__(self, page: str, listed: Sequence[Scene]) -> None:
        self._page, self._listed = page.encode(), listed
        self._lock = Lock()
        self._last: tuple[int, list[Packed], Sequence[str]] | None = None

    def answer(self, place: str) -> Answer | None:
        """Type and content of an answer; None where there is nothing of that name.

        Parameters
        ----------
        place : str
            What follows the token.
        """
        if place == "":
            return "text/html; charset=utf-8", self._page
        if (match := SCENE.fullmatch(place)) and int(match[1]) < len(self._listed):
            return "application/json", json.dumps(self._described(int(match[1]))).encode()
        if (match := LAYER.fullmatch(place)) and int(match[1]) < len(self._listed):
            files, _ = self._read(int(match[1]))
            if int(match[2]) < len(files):
                return "application/octet-stream", files[int(match[2])].content
        return None

    def _described(self, number: int) -> dict[str, Any]:
        files, remarks = self._read(number)
        layers = [{**file.about, "at": f"layer/{number}/{i}"} for i, file in enumerate(files)]
        return viewer.described(self._listed[number].title, remarks=remarks, layers=layers)

    def _read(self, number: int) -> tuple[list[Packed], Sequence[str]]:
        with self._lock:  # a browser asks for several layers at once
            if self._last is None or self._last[0] != number:
                try:
                    content = self._listed[number].load()
                except FewscanError as error:
                    content = Content(names={}, remarks=[said(error)])
                self._last = number, packed(content, level=1), content.remarks
            return self._last[1], self._last[2]


def server(pages: Pages, *, port: int = 0, token: str) -> ThreadingHTTPServer:
    """A server that listens already; ``serve_forever`` answers, ``server_close`` ends.

    Parameters
    ----------
    pages : Pages
        What to answer with.
    port : int
        0 takes a free one.
    token : str
        First part of every address.

    Raises
    ------
    ConfigError
        If the port is taken or not allowed.
    """
    try:
        found = ThreadingHTTPServer((HOST, port), _handler(pages, token))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"port {port} cannot be used ({error}); give another --port, or none") from None
    found.daemon_threads = True
    return found


def address(found: ThreadingHTTPServer, token: str) -> str:
    """What to open in a browser.

    Parameters
    ----------
    found : ThreadingHTTPServer
        From `server`.
    token : str
        The same as its own.
    """
    return f"http://{HOST}:{found.server_address[1]}/{token}/"


def view(
    directory: Path, *, images: Sequence[Path] = (), port: int = 0, ready: Callable[[str], object] = print
) -> None:
    """Serve the report of a run until interrupted.

    Parameters
    ----------
    directory : Path
        As for `fewscan.deliver.report.write_report`.
    images : sequence of Path
        As for it.
    port : int
        0 takes a free one.
    ready : callable
        Gets the address as soon as it answers.

    Raises
    ------
    DataError
        If there is nothing to report on, or nothing that a viewer could show.
    ConfigError
        If the port cannot be used.
    """
    run = read_run(directory, images)
    listed = scenes(run)
    if not listed:
        raise DataError(
            f"{directory}: holds no scan, mask or mesh to look at; `fewscan report {directory}` shows the rest"
        )
    page = page_of(run, parts_of(run), viewer_html=viewer.served(listed), script=SCRIPT, connect="'self'")
    token = secrets.token_urlsafe(32)
    with server(Pages(page, listed), port=port, token=token) as found:
        ready(address(found, token))
        found.serve_forever()


def _handler(pages: Pages, token: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        server_version, sys_version, protocol_version = "fewscan", "", "HTTP/1.1"
        timeout = 60

        def do_GET(self) -> None:
            port = self.server.server_address[1]  # type: ignore[index]
            hosts = {f"{HOST}:{port}", f"localhost:{port}"}
            given, _, place = self.path.partition("?")[0].removeprefix("/").partition("/")
            trusted = self.headers.get("Host") in hosts and hmac.compare_digest(given.encode(), token.encode())
            found = pages.answer(place) if trusted else None
            if found is None:
                self.send_error(403)
            else:
                self._send(200, *found)

        def send_error(self, code: int, *args: Any, **kwargs: Any) -> None:
            """Whatever is wrong, the answer tells nothing."""
            self.close_connection = True
            self._send(403, "text/plain; charset=utf-8", b"403\n")

        def _send(self, code: int, kind: str, content: bytes) -> None:
            self.send_response(code)
            for name, value in {**HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (its name in the library)
            """Nothing: addresses hold the token."""

    return Handler
