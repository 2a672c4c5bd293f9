"""The web server of `runner app`: where it listens, which requests it refuses, and how it stops.

Gradio is configured before it is imported: without telemetry, and with a temporary folder of its own that holds all
uploads and results and is deleted at the end. Only files in that folder, and reports, can be read through the page.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from snac_core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fastapi import FastAPI
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from snac_runner.app.conversion import Conversions

STOP_SECONDS = 2  # that open connections have when the server stops

_FETCHES = re.compile(r"/(proxy=|file=\s*[A-Za-z][A-Za-z0-9+.-]+:)")
"""Paths of Gradio's that read from other servers."""
_PAGE_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' data: blob:; connect-src 'self' data: blob:; font-src 'self' data:; "
    "worker-src 'self' blob:; object-src 'none'; frame-ancestors 'self'"
)
"""The browser sends requests to this server only."""
_REPORT_POLICY = "sandbox allow-scripts allow-downloads; frame-ancestors 'self'"


def is_loopback(host: str) -> bool:
    """Whether only programs on this machine can connect."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@contextmanager
def gradio_folder() -> Iterator[Path]:
    """Gradio's settings for this process, and the temporary folder for uploads and results."""
    with tempfile.TemporaryDirectory(prefix="snac-app-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        os.environ.update(
            GRADIO_ANALYTICS_ENABLED="False", HF_HUB_DISABLE_TELEMETRY="1", GRADIO_TEMP_DIR=str(folder),
            GRADIO_EXAMPLES_CACHE=str(folder),
        )  # fmt: skip
        if find_spec("gradio") is None:
            raise UserError("runner app needs Gradio, which is not installed: pip install 'snac-conditioning[app]'")
        yield folder


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free port.

    Raises:
        UserError: if the port is in use or not allowed, or the host is not an address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(
                f"port {port} of {host} is in use; stop the program that uses it, or give another port: "
                f"--port {port + 1 if port < 65535 else 7860}, or --port 0 for any free one"
            ) from error
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} needs the rights of an administrator; give one above 1023") from error
        raise UserError(
            f"cannot listen on {host}: {error.strerror or error}; expected an address of this machine, "
            "127.0.0.1 (this machine only) or 0.0.0.0 (all of its addresses)"
        ) from error


def web_application(conversions: Conversions, host: str) -> FastAPI:
    """The page, the reports, and what is refused."""
    import gradio as gr
    from fastapi import FastAPI
    from fastapi.responses import FileResponse, PlainTextResponse, Response
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    from snac_runner.app.adapters import REPORT_PAGES
    from snac_runner.app.interface import CSS, THEME, build

    application = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    studies = list(conversions.offer.studies.values())

    @application.get("/report/{number}/{name}")
    def report(number: int, name: str) -> Response:
        if not 0 <= number < len(studies) or name not in REPORT_PAGES or not (studies[number] / name).is_file():
            return PlainTextResponse("There is no such report.", 404)
        return FileResponse(studies[number] / name, headers={"Content-Security-Policy": _REPORT_POLICY})

    page = build(conversions)
    gr.mount_gradio_app(
        application, page, path="/", server_name=host, footer_links=["api"], run_history=False,
        max_file_size=round(conversions.limits.megabytes * 1e6), ssr_mode=False, enable_monitoring=False, pwa=False,
        mcp_server=False, theme=THEME, css_paths=CSS, favicon_path=None, show_error=False,
    )  # fmt: skip
    page.has_launched = True  # Gradio checks the paths of given files only in pages that are launched
    for component in page.blocks.values():
        _refuse_links(component)
    application.add_middleware(Guard)
    if is_loopback(host):  # a page of another server cannot reach this one under a name of its own (DNS rebinding)
        application.add_middleware(TrustedHostMiddleware, allowed_hosts=["localhost", "127.0.0.1", "[::1]", host])
    return application


def _refuse_links(component: Any) -> None:
    """Let a component accept uploads only: Gradio downloads what a client names by a link."""
    move = component.async_move_resource_to_block_cache

    async def moved(path: str | Path | None) -> str | None:
        if re.match(r"\s*[A-Za-z][A-Za-z0-9+.-]+:", str(path)):
            import gradio as gr

            raise gr.Error("links are not accepted; upload a file", print_exception=False)
        found: str | None = await move(path)
        return found

    component.async_move_resource_to_block_cache = moved


class Guard:
    """Refuses what pages of other servers send, and paths that read from other servers; sets the browser's policy."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        sent = {name: value.decode("latin-1") for name, value in scope["headers"]}
        foreign = b"origin" in sent and urlsplit(sent[b"origin"]).netloc != sent.get(b"host")
        if foreign or _FETCHES.search(scope["path"]):
            from starlette.responses import PlainTextResponse

            what = "Requests from pages of other servers are" if foreign else "Reading from other servers is"
            await PlainTextResponse(f"{what} not allowed.", 403)(scope, receive, send)
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                names = {name.lower() for name, _ in message["headers"]}
                if b"content-security-policy" not in names:
                    message["headers"].append((b"content-security-policy", _PAGE_POLICY.encode()))
                message["headers"] += [(b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]
            await send(message)

        await self.app(scope, receive, with_policy)


def serve(application: FastAPI, bound: socket.socket, started: Callable[[str], None]) -> None:
    """Serve until Ctrl-C or SIGTERM (or SIGHUP).

    Args:
        application: from `web_application`.
        bound: from `listen`.
        started: called with the page's address.
    """
    import uvicorn

    host, port = bound.getsockname()[:2]
    server = uvicorn.Server(
        uvicorn.Config(application, log_level="warning", timeout_graceful_shutdown=STOP_SECONDS, ws="none")
    )
    # uvicorn raises the signal that stopped it again when it has ended: that must not end the process
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), server.handle_exit)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # all addresses: this machine's own
    started(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    server.run(sockets=[bound])
