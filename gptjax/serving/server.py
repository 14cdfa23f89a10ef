"""An application at an address until a signal: the sockets, and a graceful end.

The first SIGTERM or Ctrl-C lets running requests finish and refuses others with 503, on a socket
that still answers; a second one ends the process at once.
"""

from __future__ import annotations

import contextlib
import importlib.util
import ipaddress
import os
import signal
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core.streams import say
from gptjax.serving.scheduler import Scheduler

LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_FLUSH_SECONDS = 5  # for the last bytes of finished answers


def check_installed() -> None:
    """Raises UserError where a library of the extra is missing."""
    for name in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(name) is None:
            raise UserError(f"a server needs {name}: pip install 'gptjax[serve]'")


def is_local(host: str) -> bool:
    """Whether only this machine reaches the address."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """The socket of an address. Raises UserError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    if not 0 <= port < 2**16:
        raise UserError(f"--port={port}: from 0 (a free one) to 65535")
    try:
        return socket.create_server((host, port), family=family, backlog=512)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port}: {error}; choose another --host or --port"
        ) from None


def url(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(app: Any, sock: socket.socket, scheduler: Scheduler) -> None:
    """Answers until a signal, in the main thread."""
    import uvicorn

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """In place of uvicorn's own, which closes the socket first."""
            before = {number: signal.signal(number, stop) for number in _SIGNALS}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    config = uvicorn.Config(
        app,
        access_log=False,
        lifespan="off",
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=_FLUSH_SECONDS,
        timeout_keep_alive=75,
        ws="none",
    )
    server = Server(config)

    def drain() -> None:
        scheduler.close()
        server.should_exit = True

    def stop(number: int, frame: FrameType | None) -> None:
        if draining.ident:
            os._exit(130)
        say(f"{signal.Signals(number).name}: finishing what runs; once more to end at once")
        draining.start()

    draining = threading.Thread(target=drain, name="drain", daemon=True)
    server.run(sockets=[sock])
