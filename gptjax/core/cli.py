"""What all commands share: flags, `--config` with its overrides, progress, results, exit codes.

A command calls `run(main, argv)`, and its `main` calls `parse`. Progress goes to stderr, results to
stdout. Exit codes: 0 done; 2 the user's input is wrong (the message alone, with `--debug` the
traceback); 130 interrupted; 1 an error of ours. To add a command, add its name to `VERBS`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import ml_collections

from gptjax.config import build, schema
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import Config

VERBS = ("train", "generate", "evaluate", "convert", "plan", "data.prepare", "data.preview")
_COMMON_FLAGS = {
    "help": "this text",
    "json": "machine-readable results on stdout",
    "debug": "show tracebacks",
}
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
) -> Args:
    """The flags of a command: `--name=value`, `--name value`, or `--name` alone.

    doc: the text that --help begins with. known: {flag: its meaning}. required: flags that must
    have a value. config: allows --config and its overrides, as "config" in `required` does. Raises
    UserError for anything else; --help prints and exits.
    """
    if config or "config" in required:
        known = {"config": "configs/file.py[:argument]", **known}
    known = {**known, **_COMMON_FLAGS}
    flags, overrides = _read_flags(argv, known)
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
    argv: Sequence[str], known: dict[str, str]
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
    logging.getLogger("absl").setLevel(logging.ERROR)
    if "--debug" in argv:  # what foreign files hold that has no effect, and the like
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("debug: %(message)s"))
        log = logging.getLogger("gptjax")
        log.setLevel(logging.DEBUG)
        log.addHandler(handler)
    try:
        main(list(argv))
    except BrokenPipeError:  # whoever read our output is gone
        sys.stderr.close()
        _exit(0)
    except (UserError, OSError) as error:
        # OSError: a file that cannot be read or written, a disk without space
        if "--debug" in argv:
            raise
        print(f"error: {_message(error)}", file=sys.stderr)
        _exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _exit(130)
    except Exception:
        traceback.print_exc()
        _exit(1)


def _message(error: UserError | OSError) -> str:
    if isinstance(error, UserError):
        return str(error)
    return f"{error.filename or 'input or output'}: {error.strerror or error}"


def _exit(code: int) -> NoReturn:
    """Ends the process. Where other processes wait for this one in a collective, it ends at once:
    JAX would hold it back for minutes.
    """
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


def say(text: str) -> None:
    """One line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def result(data: dict[str, Any], args: Args) -> None:
    """The command's result, on stdout: JSON with --json, else `name: value` lines."""
    if "json" in args:
        print(json.dumps(data))
        return
    for name, value in data.items():
        print(f"{name}: {value}")


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`: n more are done. A bar on a terminal, a line now and then elsewhere."""
    show = _progress_bar if sys.stderr.isatty() else _progress_lines
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
    if verb in ("--help", "-h"):
        print(f"gptjax <verb> [flags]; verbs: {', '.join(VERBS)}. gptjax <verb> --help says more.")
        return

    def start(argv: list[str]) -> None:
        if verb not in VERBS:
            raise UserError(unknown_name("verb", verb, list(VERBS)))
        importlib.import_module(f"gptjax.{verb}").main(argv)

    run(start, rest)
