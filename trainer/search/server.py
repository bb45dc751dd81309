"""The HTTP server of the page. library.py computes the answers.

    GET  /                       the page; /page.css, /page.js, /results.js
    GET  /api/about              models, dataset, names of fields
    GET  /api/field?name=        its most frequent values
    GET  /api/sample?sample=     metadata and captions of a sample
    POST /api/search?model=&kind=pictures|captions&count=&text= | sample= [&field=&value= ...]  body: an image or empty
    POST /api/labels?model=&sample=&template=&label= ...                                        body: an image or empty
    GET  /picture?sample=&side=  a thumbnail

Other sites must not read the images. Without a token, a request is accepted only if its Host header names this
machine (DNS rebinding). Origin and Sec-Fetch-Site must not name another site; other origins may not embed responses.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Callable
from http import HTTPStatus
from http.cookies import CookieError, SimpleCookie
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, get_args
from urllib.parse import parse_qs, urlsplit

import trainer.report
from trainer.core.types import UserError
from trainer.data.transforms import Damaged
from trainer.search.library import Kind, Library, Query

HERE = Path(__file__).parent
STYLES = (Path(trainer.report.__file__).parent / "page.css", HERE / "page.css")
"""The style of the report, and what this page adds."""
MOST_BYTES = 64 * 2**20
"""Largest upload."""
MOST_LABELS = 1000
COOKIE = "ringlip"
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob: data:; style-src 'self'; script-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}


class Refused(Exception):
    """A request that is rejected."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Server(ThreadingHTTPServer):
    """Serves ``library`` at ``host``:``port`` (0: any free port)."""

    daemon_threads = True

    def __init__(self, library: Library, host: str = "127.0.0.1", port: int = 0) -> None:
        self.library, self.host = library, host
        self.token = "" if _is_loopback(host) else secrets.token_urlsafe(16)
        try:
            super().__init__((host, port), Handler)
        except OSError as error:
            raise UserError(f"--port {port} at {host}: {error.strerror}; give another, or 0 for any") from None

    @property
    def url(self) -> str:
        """The address to open, with the token if there is one."""
        name = self.host if _is_loopback(self.host) else self.server_name
        return f"http://{name}:{self.server_address[1]}/" + (f"?token={self.token}" if self.token else "")

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignores a browser that closes its connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    """Handles one connection."""

    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60

    def do_GET(self) -> None:
        self._answer(
            {
                "/": self._page,
                "/page.css": lambda: self._send("".join(map(_text, STYLES)).encode(), "text/css"),
                "/page.js": lambda: self._send(_text(HERE / "page.js").encode(), "text/javascript"),
                "/results.js": lambda: self._send(_text(HERE / "results.js").encode(), "text/javascript"),
                "/api/about": lambda: self._json(self.server.library.about()),
                "/api/field": lambda: self._json(self.server.library.fields.common(self._one("name"))),
                "/api/sample": lambda: self._json(self.server.library.sample(self._number("sample"))),
                "/picture": self._picture,
            }
        )

    def do_POST(self) -> None:
        self._answer({"/api/search": self._search, "/api/labels": self._labels})

    def _answer(self, routes: dict[str, Callable[[], None]]) -> None:
        parts = urlsplit(self.path)
        self.asked = parse_qs(parts.query, keep_blank_values=True)
        try:
            self._check_source()
            if parts.path not in routes:
                raise Refused(HTTPStatus.NOT_FOUND, f"{parts.path}: no such page")
            routes[parts.path]()
        except Refused as error:
            self.close_connection = True  # the body may be unread
            self._json({"error": str(error)}, error.status)
        except (UserError, Damaged) as error:
            self._json({"error": str(error)}, HTTPStatus.BAD_REQUEST)

    def _check_source(self) -> None:
        """Raises Refused for a request that another site may have caused."""
        token = self.server.token
        if token:
            if not secrets.compare_digest(self._given_token().encode(), token.encode()):
                raise Refused(HTTPStatus.FORBIDDEN, "no valid token: open the URL that `ringlip search` printed")
        elif not _is_loopback(urlsplit(f"//{self.headers.get('Host', '')}").hostname or ""):
            raise Refused(HTTPStatus.FORBIDDEN, "the Host header is not localhost or 127.0.0.1")
        followed = urlsplit(self.path).path == "/"  # a link to the page itself, which holds no data
        if not followed and self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise Refused(HTTPStatus.FORBIDDEN, "the request comes from another site")
        origin = self.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != self.headers.get("Host"):
            raise Refused(HTTPStatus.FORBIDDEN, "the request comes from another site")

    def _given_token(self) -> str:
        try:
            cookie = SimpleCookie(self.headers.get("Cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        return self._one("token", cookie.value if cookie else "")

    def _page(self) -> None:
        cookie = f"{COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/" if self.server.token else ""
        self._send(_text(HERE / "page.html").encode(), "text/html", {"Set-Cookie": cookie} if cookie else {})

    def _search(self) -> None:
        query = self._query()
        kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)}
        kind = kinds.get(self._one("kind", "pictures"))
        if kind is None:
            raise UserError(f"kind: {' or '.join(kinds)}")
        filters = tuple(
            (name, value)
            for name, value in zip(self.asked.get("field", []), self.asked.get("value", []), strict=False)
            if name and value.strip()
        )
        found = self.server.library.search(query, self._model(), kind, self._number("count", 24), filters)
        self._json(found)

    def _labels(self) -> None:
        query = self._query()
        labels = [label.strip() for label in self.asked.get("label", []) if label.strip()][:MOST_LABELS]
        if not labels:
            raise UserError("no labels given")
        self._json(self.server.library.labels(query, self._model(), labels, self._one("template", "{}")))

    def _picture(self) -> None:
        side = min(max(self._number("side", 256), 16), 1600)
        data, kind = self.server.library.thumbnail(self._number("sample"), side)
        self._send(data, kind, {"Cache-Control": "private, max-age=600"})

    def _query(self) -> Query:
        picture = self._body()
        sample = self._number("sample") if "sample" in self.asked else None
        return Query(self._one("text", "").strip(), picture, sample)

    def _body(self) -> bytes:
        length = self.headers.get("Content-Length", "0")
        if not length.isdigit() or "Transfer-Encoding" in self.headers:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "no Content-Length")
        if int(length) > MOST_BYTES:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the image is larger than {MOST_BYTES // 2**20} MiB")
        return self.rfile.read(int(length))

    def _model(self) -> int:
        number = self._number("model", 0)
        if not 0 <= number < len(self.server.library.models):
            raise UserError(f"model {number}: {len(self.server.library.models)} are loaded, counted from 0")
        return number

    def _one(self, name: str, default: str | None = None) -> str:
        found = self.asked.get(name, [])
        if not found and default is None:
            raise UserError(f"{name} is missing")
        return found[0] if found else default or ""

    def _number(self, name: str, default: int | None = None) -> int:
        text = self._one(name, None if default is None else str(default))
        if not text.isascii() or not text.isdigit() or len(text) > 18:
            raise UserError(f"{name}: {text!r} is not a number")
        return int(text)

    def _json(self, value: Any, status: HTTPStatus = HTTPStatus.OK) -> None:
        self._send(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), "application/json", status=status)

    def _send(
        self, data: bytes, kind: str, headers: dict[str, str] | None = None, status: HTTPStatus = HTTPStatus.OK
    ) -> None:
        self.send_response(status)
        text = kind.startswith("text/") or kind == "application/json"
        sent = {"Content-Type": f"{kind}; charset=utf-8" if text else kind, "Content-Length": str(len(data))}
        for name, value in {"Cache-Control": "no-store", **HEADERS, **sent, **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None:
        """Requests are not logged."""


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
