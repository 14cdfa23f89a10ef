"""What all commands share: flags, `--config` with its overrides, progress, results, exit codes.

A command calls `run(main, argv)`, and its `main` calls `parse`. Progress goes to stderr, results to
stdout. Progress that cannot be written ends nothing (`streams.py`). Exit codes: 0 done; 2 the
user's input is wrong (the message alone, with `--debug` the traceback too); 130 interrupted; 141
whoever read stdout went away, as with `| head`; 1 an error of ours, or a result that could not be
written. To add a command, add its name to `VERBS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_collections

from gptjax.config import build, schema
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import Config
from gptjax.core import files, streams
from gptjax.core.streams import OutputLostError, say, say_once

__all__ = ["Args", "main", "parse", "progress", "reporting", "result", "run", "say", "say_once"]

VERBS = (
    *("train", "generate", "evaluate", "convert", "plan", "serve", "interpret"),
    *("data.prepare", "data.preview"),
)
_COMMON_FLAGS = {
    "help": "this text",
    "json": "machine-readable results on stdout",
    "debug": "show tracebacks",
}
EXIT_READER_LEFT = 141  # 128 + SIGPIPE: what a shell shows for `cat` in `cat FILE | head`
GIVEN_UP = "given up: "  # how the names of threads begin that nobody waits for
_PROGRESS_SECONDS = 10  # between lines of progress where stderr is no terminal


@dataclasses.dataclass(frozen=True)
class Args:
    """Parsed flags.

    `args["name"]` is the text of a flag, "" where it was not given; `"name" in args` tells whether
    it was. settings: the content of the --config file with the overrides applied, not yet checked.
    overrides: {"section.setting": text} of the `--config.section.setting=text` flags.
    """

    flags: dict[str, str]
    settings: ml_collections.ConfigDict | None = None
    overrides: dict[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.flags.get(name, "")

    def __contains__(self, name: str) -> bool:
        return name in self.flags

    @property
    def config(self) -> Config:
        """The checked config. Raises UserError with all its faults."""
        return build.build_config(self.settings)

    def number(self, name: str, default: Any) -> Any:
        """The flag as a number of the type of `default`, or the default. Raises UserError."""
        if name not in self.flags:
            return default
        value = build.parse(self.flags[name], type(default))
        is_nan = value != value
        if not isinstance(value, type(default)) or is_nan:
            raise UserError(
                f"--{name}={self.flags[name]}: must be {type(default).__name__}, such as {default}"
            )
        return value


def parse(
    argv: Sequence[str],
    doc: str | None,
    known: dict[str, str],
    *,
    required: Sequence[str] = (),
    config: bool = False,
    called: Mapping[str, str] = {},
) -> Args:
    """The flags of a command: `--name=value`, `--name value`, or `--name` alone.

    doc: the text that --help begins with. known: {flag: its meaning}. required: flags that must
    have a value. config: allows --config and its overrides, as "config" in `required` does.
    called: {name that other programs have for a flag: its name here}, for the message. Raises
    UserError for anything else; --help prints and exits.
    """
    if config or "config" in required:
        known = {"config": "configs/file.py[:argument]", **known}
    known = {**known, **_COMMON_FLAGS}
    flags, overrides = _read_flags(argv, known, called)
    if "help" in flags:
        _print_help(doc, known)
        raise SystemExit(0)
    missing = [name for name in required if flags.get(name, "true") in ("", "true")]
    if missing:
        names = " and ".join(f"--{name}" for name in missing)
        raise UserError(f"missing {names}; see --help")
    if not flags.get("config"):
        if overrides:
            raise UserError(
                "--config.section.setting=value changes a config, and there is no --config=FILE"
            )
        return Args(flags)
    settings = build.load_file(flags["config"])
    build.override(settings, overrides)
    return Args(flags, settings, overrides)


def _read_flags(
    argv: Sequence[str], known: dict[str, str], called: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """(flags, overrides); a flag without a value is "true"."""
    flags: dict[str, str] = {}
    overrides: dict[str, str] = {}
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            raise UserError(f"unexpected argument {arg!r}: flags are --name=value, see --help")
        name, equals, value = arg[2:].partition("=")
        has_value = bool(equals)
        if not has_value and rest and not rest[0].startswith("--"):
            value, has_value = rest.pop(0), True
        if name.startswith("config.") and "config" in known:
            overrides[name.removeprefix("config.")] = value
        elif name in known:
            flags[name] = value if has_value else "true"
        elif called.get(name) in known:
            raise UserError(f"--{name} is called --{called[name]} here")
        elif "." in name and "config" in known:
            raise UserError(
                f"no flag '--{name}'; a setting is changed by --config.{name}=VALUE, with "
                "--config=FILE"
            )
        else:
            raise UserError(unknown_name("flag", f"--{name}", [f"--{n}" for n in known]))
    return flags, overrides


def _print_help(doc: str | None, known: dict[str, str]) -> None:
    print(f"{doc}\nFlags:")
    for name, meaning in known.items():
        print(f"  --{name:<18} {meaning}")
    if "config" not in known:
        return
    print("  --config.section.setting=value overrides one setting:")
    for path, kind, field in schema.all_settings():
        kind_name = getattr(kind, "__name__", kind)
        print(f"      {path:<28} {field.metadata['meaning']} ({kind_name}, {field.default!r})")


def run(main: Callable[[list[str]], None], argv: Sequence[str]) -> None:
    """Runs a command and turns its end into an exit code and, for wrong input, one message."""
    with streams.guarded():
        code = _exit_code(main, list(argv))
    _end(code)


def _exit_code(main: Callable[[list[str]], None], argv: list[str]) -> int:
    debug = "--debug" in argv
    logging.getLogger("absl").setLevel(logging.ERROR)
    if debug:  # what foreign files hold that has no effect, and the like
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("debug: %(message)s"))
        log = logging.getLogger("gptjax")
        log.setLevel(logging.DEBUG)
        log.addHandler(handler)
    try:
        return _code_of_main(main, argv)
    except OutputLostError as lost:
        if lost.reader_left:
            return EXIT_READER_LEFT
        say(f"error: the result could not be written to stdout: {lost}")
        return 1
    except (UserError, OSError) as error:
        # OSError: a file that cannot be read or written, a disk without space
        if debug:
            traceback.print_exc()
        say(f"error: {error if isinstance(error, UserError) else files.explain(error)}")
        return 2
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    except Exception:
        traceback.print_exc()
        return 1


def _code_of_main(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """0, or the code of a SystemExit: it says more than a result that could not be written."""
    try:
        main(argv)
        sys.stdout.flush()
    except SystemExit as end:
        if end.code:
            if isinstance(end.code, str):
                say(end.code)
            with contextlib.suppress(OutputLostError):
                sys.stdout.flush()
            return end.code if isinstance(end.code, int) else 1
        sys.stdout.flush()
    return 0


def _end(code: int) -> None:
    """Ends the process with this code.

    At once where other processes wait for this one in a collective, because JAX would hold it back
    for minutes, and where a tracker hangs that was given up on.
    """
    jax = sys.modules.get("jax")
    waited_for = code and jax is not None and jax.distributed.is_initialized()
    hangs = any(thread.name.startswith(GIVEN_UP) for thread in threading.enumerate())
    if waited_for or hangs:
        os._exit(code)
    if code:
        raise SystemExit(code)


def result(data: dict[str, Any], args: Args) -> None:
    """The command's result, on stdout: JSON with --json, else `name: value` lines.

    The work is done and on disk, so that a reader who left is told of as any other loss.
    """
    if "json" in args:
        text = json.dumps(data)
    else:
        text = "\n".join(f"{name}: {value}" for name, value in data.items())
    try:
        print(text, flush=True)
    except OutputLostError as lost:
        raise OutputLostError(str(lost)) from None


@contextlib.contextmanager
def reporting(what: str) -> Iterator[None]:
    """Around work that only reports: what goes wrong in it is said (with --debug in full), and
    the block is left.
    """
    try:
        yield
    except Exception as error:
        logging.getLogger("gptjax").debug("%s", what, exc_info=True)
        say(f"warning: {what}: {type(error).__name__}: {files.reason(error)}; the run goes on")


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`: n more are done. A bar on a terminal, a line now and then elsewhere."""
    show = _progress_bar if streams.stderr_is_terminal() else _progress_lines
    with show(what, total) as advance:
        yield advance


@contextlib.contextmanager
def _progress_bar(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    from rich import progress as rich_progress
    from rich.console import Console

    columns = (
        rich_progress.TextColumn(what),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TimeRemainingColumn(),
    )
    with rich_progress.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)


@contextlib.contextmanager
def _progress_lines(what: str, total: int | None) -> Iterator[Callable[[int], None]]:
    start = last = time.monotonic()
    done = 0
    of_total = f" of {total:,}" if total else ""

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last > _PROGRESS_SECONDS:
            last = time.monotonic()
            say(f"{what}: {done:,}{of_total} in {last - start:.0f} s")

    yield advance


def main() -> None:
    """The console script: `gptjax <verb> ...` is `python -m gptjax.<verb> ...`."""
    verb, *rest = sys.argv[1:] or ["--help"]

    def start(argv: list[str]) -> None:
        if verb in ("--help", "-h"):
            verbs = ", ".join(VERBS)
            print(f"gptjax <verb> [flags]; verbs: {verbs}. gptjax <verb> --help says more.")
            return
        if verb not in VERBS:
            raise UserError(unknown_name("verb", verb, list(VERBS)))
        importlib.import_module(f"gptjax.{verb}").main(argv)

    run(start, rest)
