"""Standard streams that cannot end a command's work.

`say` is one line of progress on stderr. Within `guarded` (around every command) stderr gives up
quietly: a reader that went away, a full disk or a closed stream takes nothing from the work, and a
reader that is there and reads nothing holds it up for a second, once. stdout is for results: what
cannot be written there raises `OutputLostError`, for a command whose result is lost is not done.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import os
import select
import sys
from collections.abc import Iterator
from typing import Any

_PATIENCE_MS = 1000  # for a pipe or a terminal that takes nothing; after that it is asked once
_PIECE = 512  # bytes that a stream which says it is ready takes at once (PIPE_BUF of POSIX)


class OutputLostError(Exception):
    """The result could not be written to stdout. reader_left: as with `| head`."""

    def __init__(self, reason: str, *, reader_left: bool = False) -> None:
        super().__init__(reason)
        self.reader_left = reader_left


def fill_closed() -> None:
    """Opens the null device in place of a standard stream that is closed.

    Else the next file opened gets its number, and what libraries write to number 2 ends up in it.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
            os.set_inheritable(number, True)


def say(text: str) -> None:
    """One line of progress, on stderr. Where it cannot be written, nothing happens."""
    if sys.stderr is None:  # print would take stdout
        return
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


@functools.cache
def say_once(text: str) -> None:
    """`say`, the first time in this process that it is this text."""
    say(text)


def stderr_is_terminal() -> bool:
    """Whether a progress bar makes sense."""
    try:
        return sys.stderr is not None and sys.stderr.isatty()
    except ValueError:  # closed
        return False


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Standard streams as the module describes them."""
    fill_closed()
    before = sys.stdin, sys.stdout, sys.stderr
    streams: Any = sys
    if sys.stdin is None:
        streams.stdin = io.StringIO()
    streams.stdout, streams.stderr = ResultStream(sys.stdout), ProgressStream(sys.stderr)
    try:
        yield
    finally:
        streams.stdin, streams.stdout, streams.stderr = before


class ProgressStream:
    """stderr. Written without a buffer, so that nothing is left to fail at the process's end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._number = _number_of(stream) if stream is not None else None
        self._left_out = 0  # pieces that the reader did not take
        self.encoding = getattr(stream, "encoding", None) or "utf-8"
        if self._number is not None:
            with contextlib.suppress(OSError, ValueError):
                stream.flush()

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            if self._number is None:
                if self._stream is not None:
                    self._stream.write(text)
            else:
                self._send(self._number, text.encode(self.encoding, "backslashreplace"))
        return len(text)

    def _send(self, number: int, data: bytes) -> None:
        poll = select.poll()
        poll.register(number, select.POLLOUT)
        while data:
            if not poll.poll(0 if self._left_out else _PATIENCE_MS):
                self._left_out += 1
                return
            if self._left_out:
                note = f"\n({self._left_out} lines left out: nobody read them)\n"
                self._left_out = 0
                data = note.encode(self.encoding) + data
            data = data[os.write(number, data[:_PIECE]) :]

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            if self._stream is not None:
                self._stream.flush()

    def isatty(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class ResultStream:
    """stdout. Raises OutputLostError for what cannot be written, then and ever after."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._lost: OutputLostError | None = None

    def write(self, text: str) -> int:
        with self._or_lost():
            return self._stream.write(text)

    def flush(self) -> None:
        if self._stream is None:  # nothing was written
            return
        with self._or_lost():
            self._stream.flush()

    @contextlib.contextmanager
    def _or_lost(self) -> Iterator[None]:
        if self._lost:
            raise self._lost
        if self._stream is None:
            raise OutputLostError("stdout is closed")
        try:
            yield
        except UnicodeEncodeError as error:
            raise OutputLostError(
                f"its encoding {error.encoding} has no {error.object[error.start]!r}; "
                "export PYTHONIOENCODING=utf-8"
            ) from None
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            reader_left = getattr(error, "errno", None) == errno.EPIPE
            self._lost = OutputLostError(reason, reader_left=reader_left)
            _empty_buffer(self._stream)
            raise self._lost from None

    def isatty(self) -> bool:
        return self._stream is not None and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _number_of(stream: Any) -> int | None:
    """2 for the process's own stderr; None for a stream of a test or a notebook."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if stream.fileno() == 2:
            return 2
    return None


def _empty_buffer(stream: Any) -> None:
    """Sends what is still in a broken stream's buffer to the null device.

    Else it would fail once more at the end of the process, with exit code 120.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):
        number = stream.fileno()
        if number != 1:
            return
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, number)
        os.close(null)
        stream.flush()
