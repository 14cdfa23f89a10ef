"""Which text gets a slot, and when: one thread that drives a `SlotEngine` for all requests.

In: jobs, from any thread. Out: `Piece`s, given to each request's `on_piece` in the scheduler's
thread. The queue is bounded; whoever is cancelled, too slow or unlucky leaves its slot within a
turn, and the others go on.
"""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from gptjax.config.errors import UserError
from gptjax.core.streams import say
from gptjax.generation.slot_programs import Alternatives
from gptjax.generation.slots import Job, SlotEngine, Text
from gptjax.serving.errors import ApiError, too_busy, unavailable
from gptjax.serving.metrics import Metrics


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is new in one text of a request."""

    index: int  # of the job in its request
    text: str = ""  # characters that nothing can take back
    tokens: Sequence[int] = ()
    logprobs: Sequence[float] = ()
    alternatives: Sequence[Alternatives] = ()
    prompt_scores: Sequence[tuple[float, Alternatives]] = ()  # with the first tokens
    reason: str = ""  # "stop" or "length" in the last piece
    cut: bool = False  # by a stop text, which its last tokens hold
    error: ApiError | None = None  # ends the request


@dataclasses.dataclass(eq=False)
class Ticket:
    """A request: its jobs, and who hears of them."""

    jobs: Sequence[Job]
    on_piece: Callable[[Piece], None]
    began: float
    left: int  # texts that have not ended
    started: bool = False  # whether one of its texts had a slot
    ended: bool = False


@dataclasses.dataclass(eq=False)
class _Writing:
    """A job that waits for a slot, or has one."""

    ticket: Ticket
    index: int
    text: Text | None = None
    tokens: int = 0  # of the text that were given away
    characters: int = 0
    last: float = 0.0  # when a token came


class Scheduler:
    """The thread, its queue and its slots.

    queue: texts that may wait. timeout: seconds for one request, its wait included.
    """

    def __init__(
        self, engine: SlotEngine, metrics: Metrics, *, queue: int = 64, timeout: float = 600.0
    ):
        self.engine, self.metrics = engine, metrics
        self.slots, self.queue, self.timeout = engine.free, queue, timeout
        self.stopping = False
        self.ready = False  # whether the first programs are compiled
        self._waiting: collections.deque[_Writing] = collections.deque()
        self._running: dict[Text, _Writing] = {}
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        metrics.slots.set(self.slots)

    def start(self, warm_up: Sequence[Job] = ()) -> None:
        """Starts the thread, which first runs some jobs to compile their programs."""
        self._calls.append(functools.partial(self._warm_up, warm_up))
        self._thread.start()

    def submit(self, jobs: Sequence[Job], on_piece: Callable[[Piece], None]) -> Ticket:
        """Queues the jobs of a request, all or none. Raises ApiError, and UserError for a job that
        cannot run."""
        for job in jobs:
            self.engine.check(job)
        if len(jobs) > self.queue + self.slots:
            raise ApiError(
                400,
                f"the request is for {len(jobs)} texts, and this server takes "
                f"{self.queue + self.slots} at once: send several",
                code="too_many_texts",
            )
        ticket = Ticket(jobs, on_piece, time.monotonic(), len(jobs))
        with self._changed:
            self._refuse_if_stopping()
            if self._load() + len(jobs) > self.queue + self.slots:
                raise too_busy(
                    f"{len(self._waiting)} texts wait already, and the queue holds {self.queue}"
                )
            self._waiting.extend(_Writing(ticket, i) for i in range(len(jobs)))
            self._changed.notify()
        self.metrics.queue.set(len(self._waiting))
        return ticket

    def call(self, function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
        """Runs other work for the device between two turns. Raises ApiError."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        with self._changed:
            self._refuse_if_stopping()
            if self._load() >= self.queue + self.slots:
                raise too_busy(f"{len(self._waiting)} texts wait already")
            self._calls.append(run)
            self._changed.notify()
        return future

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for it any longer: its slots are free after this turn."""
        with self._changed:
            ticket.ended = True
            self._changed.notify()

    def close(self, *, drain: bool = True) -> None:
        """Takes nothing new, refuses what waits, and returns when what runs is finished.

        drain: False refuses that too."""
        with self._changed:
            self.stopping = True
            for writing in (*self._waiting, *self._running.values()):
                if not (drain and writing.ticket.started):
                    self._fail(writing.ticket, unavailable("the server stops"))
            self._changed.notify()
        if self._thread.ident:
            self._thread.join()
        self.engine.close()

    def _refuse_if_stopping(self) -> None:
        if self.stopping:
            raise unavailable("the server stops and takes no new requests")

    def _load(self) -> int:
        return len(self._waiting) + len(self._running) + len(self._calls)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._waiting or self._running or self._calls):
                    if self.stopping:
                        return
                    self._changed.wait()
                calls = list(self._calls)
                self._calls.clear()
            for call in calls:
                call()
            try:
                self._turn()
            except Exception:
                traceback.print_exc()
                self._recover()

    def _turn(self) -> None:
        self._drop()
        self._fill()
        changed = self.engine.turn() if self._running else []
        for text in changed:
            self._give(self._running[text])
        self.metrics.slots_used.set(self.slots - self.engine.free)

    def _drop(self) -> None:
        """Takes out what is cancelled or too late."""
        now = time.monotonic()
        with self._changed:
            for writing in (*self._waiting, *self._running.values()):
                ticket = writing.ticket
                if not ticket.ended and now - ticket.began > self.timeout:
                    message = f"the request ran for longer than {self.timeout:g} s"
                    self._fail(ticket, ApiError(408, message, code="timeout"))
            kept = [writing for writing in self._waiting if not writing.ticket.ended]
            self._waiting = collections.deque(kept)
        for text, writing in list(self._running.items()):
            if writing.ticket.ended:
                self._leave(text, "cancelled")

    def _fill(self) -> None:
        """Gives free slots to those that wait, in their order."""
        while self.engine.free:
            with self._changed:
                if not self._waiting:
                    break
                writing = self._waiting.popleft()
            job = writing.ticket.jobs[writing.index]
            try:
                writing.text = text = self.engine.enter(job)
            except UserError as error:
                self._fail(writing.ticket, ApiError(400, str(error)))
                continue
            except Exception:
                traceback.print_exc()
                self._fail(writing.ticket, _engine_failed())
                continue
            self._running[text] = writing
            writing.ticket.started = True
            self.metrics.wait.observe(time.monotonic() - writing.ticket.began)
            self.metrics.prompt_tokens.inc(len(job.prompt))
        self.metrics.queue.set(len(self._waiting))

    def _give(self, writing: _Writing) -> None:
        """Tells a request what is new in one of its texts."""
        text, ticket = writing.text, writing.ticket
        assert text is not None
        sequence = text.sequence
        known, size = writing.tokens, len(sequence.tokens)
        if not sequence.reason and size == known:
            return  # a part of its prompt was fed
        now = time.monotonic()
        self._count(writing, size - known, now)
        piece = Piece(
            index=writing.index,
            text=sequence.text[writing.characters : sequence.safe],
            tokens=tuple(sequence.tokens[known:]),
            logprobs=tuple(sequence.logprobs[known:]),
            alternatives=tuple(text.alternatives[known:]),
            prompt_scores=() if writing.last else tuple(text.prompt_scores),
            reason=sequence.reason,
            cut=sequence.reason == "stop" and sequence.end is None,
        )
        writing.tokens, writing.characters = size, sequence.safe
        writing.last = now
        if sequence.reason:
            self._leave(text, sequence.reason)
            ticket.left -= 1
        if not ticket.ended:
            ticket.on_piece(piece)
            ticket.ended = ticket.left == 0

    def _count(self, writing: _Writing, new: int, now: float) -> None:
        self.metrics.new_tokens.inc(new)
        if not writing.last:
            self.metrics.first_token.observe(now - writing.ticket.began)
            return
        for _ in range(new):
            self.metrics.between_tokens.observe((now - writing.last) / new)

    def _leave(self, text: Text, reason: str) -> None:
        del self._running[text]
        self.engine.leave(text)
        self.metrics.texts.labels(reason).inc()

    def _fail(self, ticket: Ticket, error: ApiError) -> None:
        if not ticket.ended:
            ticket.ended = True
            ticket.on_piece(Piece(0, error=error))

    def _recover(self) -> None:
        """After an error of the engine: it begins anew, and those that it ran get a 500."""
        try:
            self.engine.reset()
        finally:  # whoever waits is told in any case
            for text, writing in list(self._running.items()):
                self._leave(text, "error")
                self._fail(writing.ticket, _engine_failed())

    def _warm_up(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            if self.stopping:
                break
            try:
                text = self.engine.enter(job)
                while not text.sequence.reason:
                    self.engine.turn()
            except Exception as error:
                say(f"warning: a first text could not be written: {error}")
                self.engine.reset()
        self.ready = True


def _engine_failed() -> ApiError:
    return ApiError(500, "the model failed at this request; its error is in the server's log")
