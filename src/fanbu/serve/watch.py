"""``fanbu watch``: a page on this machine that follows a running round.

It listens on 127.0.0.1 only, reads the workspace and writes nothing. The page is one file without outside parts; it
gets what changed as Server-Sent Events, and asks once a second where those do not come through.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import signal
import threading
import webbrowser
from collections.abc import Iterator
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from fanbu.errors import UsageError
from fanbu.lang import translator
from fanbu.progress import log
from fanbu.serve.files import KEY, signature
from fanbu.serve.state import look

_EVERY = 0.25  # seconds between looks at the files
_FOLLOWERS = 8  # pages that get events at once; more of them ask once a second
_CONNECTIONS = 64
_REPORT = re.compile(rf"/(?:rounds/(?:{KEY.pattern})/)?report\.html")
_SAFE = {
    "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin", "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}  # fmt: skip
# A report is a file of the workspace: it is styled, and nothing in it runs or reaches anything.
_REPORT_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; sandbox"
)


def watch(workspace: Path, port: int = 0, open_browser: bool = False, lang: str = "en") -> None:
    """Serves the page until Ctrl-C. Port 0 takes a free one. Raises UsageError where there is nothing to watch."""
    with contextlib.suppress(KeyboardInterrupt), _stopped_by_signals(), make_server(workspace, port, lang) as server:
        log(f"watching {workspace} at {server.url} (Ctrl-C ends it)")
        if open_browser:
            webbrowser.open(server.url)
        server.serve_forever(poll_interval=0.2)


def make_server(workspace: Path, port: int = 0, lang: str = "en") -> Server:
    """The server, listening but not serving yet; closing it ends all that it started."""
    if not workspace.is_dir():
        raise UsageError(
            "no-workspace", f"there is no workspace {workspace}", got=workspace,
            remedy="start `fanbu run` first, or name its workspace (runs/NAME)",
        )  # fmt: skip
    if not 0 <= port < 2**16:
        raise UsageError("port", "--port", allowed="0 to 65535", got=port, remedy="leave it out to take a free one")
    translator("watch", lang)  # an unknown language is refused before anything listens
    try:
        return Server(workspace, port, lang)
    except OSError as error:
        raise UsageError(
            "port", f"cannot listen on 127.0.0.1:{port}: {error.strerror}", got=port,
            remedy="name another port, or leave it out to take a free one",
        ) from None  # fmt: skip


class Server(ThreadingHTTPServer):
    """Looks at the workspace four times a second and wakes the pages that follow it."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, workspace: Path, port: int, lang: str) -> None:
        self.root, self.lang = workspace.resolve(), lang
        self.followers, self._connections = threading.BoundedSemaphore(_FOLLOWERS), threading.Semaphore(_CONNECTIONS)
        self.changed, self.closing = threading.Condition(), threading.Event()
        self.version, self.state = 0, self.look()
        super().__init__(("127.0.0.1", port), Handler)
        self.port = int(self.server_address[1])
        self.url = f"http://127.0.0.1:{self.port}/"
        self.hosts = {f"127.0.0.1:{self.port}", f"localhost:{self.port}"}
        self._watcher = threading.Thread(target=self._follow, name="fanbu-watch", daemon=True)
        self._watcher.start()

    def look(self) -> dict[str, str]:
        """The parts of the page, each as JSON."""
        return {part: json.dumps(value, ensure_ascii=True) for part, value in look(self.root, self.lang).items()}

    def moved_on(self, version: int) -> bool:
        """Whether there is something to tell a page that knows this version."""
        return self.version != version or self.closing.is_set()

    def _follow(self) -> None:
        """A new state whenever a file changed, and every second for the clock and for runs that died."""
        before, waited = signature(self.root), 0
        while not self.closing.wait(_EVERY):
            now, waited = signature(self.root), waited + 1
            if now == before and waited < 4:
                continue
            before, waited = now, 0
            with contextlib.suppress(Exception):  # whatever is in those files, the next look may be better
                state = self.look()
                if state != self.state:
                    with self.changed:
                        self.version, self.state = self.version + 1, state
                        self.changed.notify_all()

    def server_close(self) -> None:
        """Ends the watching and the pages' events too."""
        self.closing.set()
        with self.changed:
            self.changed.notify_all()
        super().server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """One thread a connection, but never very many."""
        if self._connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Counts the connection out again."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A page that was closed is no error."""


class Handler(BaseHTTPRequestHandler):
    """The five things that can be asked for; everything else is refused."""

    server: Server
    timeout = 20.0
    server_version, sys_version = "fanbu", ""

    def do_GET(self) -> None:
        """The page, its state, its events, and the reports."""
        refused = self._refusal()
        if refused is not None:
            self._send(refused, refused.phrase)
        elif self.path == "/":
            self._page()
        elif self.path == "/state":
            body = ",".join(f"{json.dumps(part)}:{value}" for part, value in self.server.state.items())
            self._send(HTTPStatus.OK, f"{{{body}}}", "application/json")
        elif self.path == "/events":
            self._events()
        elif _REPORT.fullmatch(self.path):
            self._report()
        else:
            self._send(HTTPStatus.NOT_FOUND, "Not Found")

    do_HEAD = do_GET  # noqa: N815

    def _refuse(self) -> None:
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, "Only GET and HEAD", headers={"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_TRACE = do_CONNECT = _refuse  # noqa: N815

    def _refusal(self) -> HTTPStatus | None:
        """Other hosts' names (DNS rebinding) and other sites' scripts get nothing."""
        if self.headers.get_all("Host", []) not in [[host] for host in self.server.hosts]:
            return HTTPStatus.FORBIDDEN
        site, mode = self.headers.get("Sec-Fetch-Site"), self.headers.get("Sec-Fetch-Mode")
        foreign = site in ("cross-site", "same-site") and mode != "navigate"
        return HTTPStatus.FORBIDDEN if foreign else None

    def _page(self) -> None:
        nonce = secrets.token_urlsafe(16)
        policy = (
            f"default-src 'none'; style-src 'nonce-{nonce}'; script-src 'nonce-{nonce}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        page = render(self.server.lang, nonce)
        self._send(HTTPStatus.OK, page, "text/html", {"Content-Security-Policy": policy})

    def _report(self) -> None:
        path = (self.server.root / self.path[1:]).resolve()
        if not path.is_relative_to(self.server.root) or not path.is_file():
            self._send(HTTPStatus.NOT_FOUND, "Not Found")
            return
        headers = {"Content-Security-Policy": _REPORT_POLICY}
        self._send(HTTPStatus.OK, path.read_text(encoding="utf-8", errors="replace"), "text/html", headers)

    def _events(self) -> None:
        """Each part that changed, as one event; a comment now and then shows that the line still holds."""
        if self.command == "HEAD" or not self.server.followers.acquire(blocking=False):
            self._send(HTTPStatus.SERVICE_UNAVAILABLE, "Ask /state instead")
            return
        try:
            self._head(HTTPStatus.OK, "text/event-stream", {})
            for message in self._messages():
                self.wfile.write(message.encode())
                self.wfile.flush()
        except OSError:
            return  # the page was closed
        finally:
            self.server.followers.release()

    def _messages(self) -> Iterator[str]:
        sent: dict[str, str] = {}
        server = self.server
        while not server.closing.is_set():
            with server.changed:
                state, version = server.state, server.version
            fresh = [f"{json.dumps(part)}:{value}" for part, value in state.items() if sent.get(part) != value]
            sent = state
            yield f"data: {{{','.join(fresh)}}}\n\n" if fresh else ": still here\n\n"
            with server.changed:
                server.changed.wait_for(partial(server.moved_on, version), 10)

    def _send(
        self, status: HTTPStatus, text: str, kind: str = "text/plain", headers: dict[str, str] | None = None
    ) -> None:
        body = text.encode("utf-8", "backslashreplace")
        with contextlib.suppress(OSError):
            self._head(status, kind, {**(headers or {}), "Content-Length": str(len(body))})
            if self.command != "HEAD":
                self.wfile.write(body)

    def _head(self, status: HTTPStatus, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": f"{kind}; charset=utf-8", **_SAFE, **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: the page asks often."""


def render(lang: str, nonce: str) -> str:
    """The page without its state: labels, style and script."""
    import jinja2

    here = Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([here, here.parent / "report"]), autoescape=True, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    say = translator("watch", lang)
    return environment.get_template("watch.html.j2").render(say=say, lang={"zh": "zh-CN"}.get(lang, lang), nonce=nonce)


@contextlib.contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the page in good order, where the command line would end the process at once."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
