"""What all commands share: flags, `--config` with its overrides, progress on stderr, results on stdout, exit codes.

Exit codes: 0 done, 2 the user's input is wrong (the message alone; `--debug` adds the traceback), 130 interrupted, 1 our fault.
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

from gptjax.config import build, schema
from gptjax.config.errors import UserError, unknown_name
from gptjax.config.schema import Config

VERBS = ("train", "generate", "evaluate", "convert", "plan", "data.prepare", "data.preview")


_COMMON = {
    "help": "this text",
    "json": "machine-readable results on stdout",
    "debug": "show tracebacks",
}


@dataclasses.dataclass(frozen=True)
class Args:
    """Parsed flags: `args["name"]` is text ("" when absent), `name in args` tells a flag that was given."""

    flags: dict[str, str]
    settings: Any = None  # the ConfigDict, overrides applied
    overrides: dict[str, str] = dataclasses.field(default_factory=dict)

    def __getitem__(self, name: str) -> str:
        return self.flags.get(name, "")

    def __contains__(self, name: str) -> bool:
        return name in self.flags

    @property
    def config(self) -> Config:
        return build.build_config(self.settings)

    def number(self, name: str, default: Any) -> Any:
        """The flag as a number of the type of `default`."""
        if name not in self.flags:
            return default
        value = build.parse(self.flags[name], type(default))
        if not isinstance(value, type(default)) or value != value:
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
    """`--name=value`, `--name value` and bare `--name` flags. `config` (or that name in `required`) allows `--config.a.b=value`."""
    known = {
        **({"config": "configs/file.py[:argument]"} if config or "config" in required else {}),
        **known,
        **_COMMON,
    }
    flags: dict[str, str] = {}
    overrides: dict[str, str] = {}
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if not arg.startswith("--"):
            raise UserError(f"unexpected argument {arg!r}: flags are --name=value, see --help")
        name, has_value, value = arg[2:].partition("=")
        if not has_value and rest and not rest[0].startswith("--"):
            value, has_value = rest.pop(0), "="
        if name.startswith("config.") and "config" in known:
            overrides[name.removeprefix("config.")] = value
        elif name in known:
            flags[name] = value if has_value else "true"
        else:
            raise UserError(unknown_name("flag", f"--{name}", [f"--{n}" for n in known]))
    if "help" in flags:
        print(
            f"{doc}\nFlags:\n"
            + "\n".join(f"  --{name:<18} {meaning}" for name, meaning in known.items())
        )
        if "config" in known:
            print("  --config.section.setting=value overrides one setting:")
            for path, kind, field in schema.all_settings():
                print(
                    f"      {path:<28} {field.metadata['meaning']} ({getattr(kind, '__name__', kind)}, {field.default!r})"
                )
        raise SystemExit(0)
    if missing := [
        f"--{name}" for name in required if not flags.get(name) or flags[name] == "true"
    ]:
        raise UserError(f"missing {' and '.join(missing)}; see --help")
    settings = None
    if overrides and not flags.get("config"):
        raise UserError(
            "--config.section.setting=value changes a config, and there is no --config=FILE"
        )
    if flags.get("config"):
        settings = build.load_file(flags["config"])
        build.override(settings, overrides)
    return Args(flags, settings, overrides)


def run(main: Callable[[list[str]], None], argv: Sequence[str]) -> None:
    """Runs a command and turns its end into an exit code and, for wrong input, one message."""
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        main(list(argv))
    except BrokenPipeError:  # the reader of our output went away
        sys.stderr.close()
        _leave(0)
    except (
        UserError,
        OSError,
    ) as error:  # OSError: a place that cannot be read or written, a full disk
        if "--debug" in argv:
            raise
        where = "" if isinstance(error, UserError) else f"{error.filename or 'input or output'}: "
        print(f"error: {where}{getattr(error, 'strerror', None) or error}", file=sys.stderr)
        _leave(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _leave(130)
    except Exception:
        traceback.print_exc()
        _leave(1)


def _leave(code: int) -> NoReturn:
    """Ends the process; at once where others wait for it in a collective: JAX would hold this one back for minutes."""
    jax = sys.modules.get("jax")
    if jax is not None and jax.distributed.is_initialized():
        sys.stdout.flush()
        os._exit(code)
    raise SystemExit(code)


def say(text: str) -> None:
    """One line of progress, on stderr."""
    print(text, file=sys.stderr, flush=True)


def result(data: dict[str, Any], args: Args) -> None:
    """The command's result, on stdout."""
    if "json" in args:
        print(json.dumps(data))
    else:
        print("\n".join(f"{name}: {value}" for name, value in data.items()))


@contextlib.contextmanager
def progress(what: str, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`. A bar on a terminal, a line every ten seconds elsewhere."""
    start = last = time.monotonic()
    done = 0
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda n: bar.advance(task, n)
        return

    def advance(n: int) -> None:
        nonlocal done, last
        done += n
        if time.monotonic() - last > 10:
            last = time.monotonic()
            say(
                f"{what}: {done:,}"
                + (f" of {total:,}" if total else "")
                + f" in {last - start:.0f} s"
            )

    yield advance


def main() -> None:
    """`gptjax <verb> ...` is `python -m gptjax.<verb> ...`."""
    verb, *rest = sys.argv[1:] or ["--help"]
    if verb in ("--help", "-h"):
        print(f"gptjax <verb> [flags]; verbs: {', '.join(VERBS)}. gptjax <verb> --help says more.")
        return

    def start(argv: list[str]) -> None:
        if verb not in VERBS:
            raise UserError(unknown_name("verb", verb, list(VERBS)))
        importlib.import_module(f"gptjax.{verb}").main(argv)

    run(start, rest)
