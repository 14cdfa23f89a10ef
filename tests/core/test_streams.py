"""Standard streams: progress that cannot be written ends nothing, a lost result is never code 0."""

import io
import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from gptjax.config.errors import UserError
from gptjax.core import cli, streams

# A command without JAX: progress, work (a file), a result.
COMMAND = """
import gptjax, select, sys
from gptjax.core import cli
def main(argv):
    cli.say("first line")
    if "leaves" in argv:
        left = select.poll()
        left.register(2, 0)
        left.poll()  # until the reader has gone
    for i in range(300):
        print(f"line {i} " + "x" * 100, file=sys.stderr, flush=True)
    open(argv[0], "w").write("done")
    if "short" in argv:
        print("text that stays in the buffer until the end")
    elif "print" in argv:
        for i in range(100_000): print("text", i)
    else:
        try:
            cli.result({"a": 1}, cli.Args({}))
        finally:
            if "interrupted" in argv: raise SystemExit(130)
cli.run(main, sys.argv[1:])
"""


def shell(line, tmp_path, *args):
    """(exit code, stderr) of bash with {} for the command; its work must be done."""
    work = tmp_path / "work"
    words = [sys.executable, "-c", COMMAND, str(work), *args]
    command = " ".join(f"'{word}'" for word in words)
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line.replace("{}", command)],
        cwd=ROOT,
        # with buffers, as users have them: what is left in one fails at the end
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert work.read_text() == "done"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        ("{} 2>/dev/full", 0, ""),
        ("{} 2>&1 >/dev/null | head -1", 0, ""),
        ("{} 2>&1 | head -1", 1, ""),
        ("{} >/dev/full", 1, "could not be written to stdout: No space left on device"),
        ("{} >&-", 1, "could not be written to stdout: stdout is closed"),
        ("{} <&- >&- 2>&-", 1, ""),
    ],
)
def test_streams_that_cannot_be_written(line, code, message, tmp_path):
    ended, stderr = shell(line, tmp_path, *(["leaves"] if "head" in line else []))
    assert (ended, message in stderr) == (code, True)


def test_text_whose_reader_leaves_ends_quietly_as_unix_tools_do(tmp_path):
    ended, stderr = shell("{} 2>/dev/null | head -1", tmp_path, "print")
    assert (ended, stderr) == (cli.EXIT_READER_LEFT, "")


def test_a_result_that_stdout_cannot_encode_is_one_message(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda argv: print("é"), [])
    assert ended.value.code == 1
    message = "error: the result could not be written to stdout: its encoding ascii has no 'é'; "
    assert capsys.readouterr().err == f"{message}export PYTHONIOENCODING=utf-8\n"


def test_text_that_fails_with_the_last_flush_is_no_success(tmp_path):
    ended, stderr = shell("{} >/dev/full", tmp_path, "short")
    assert ended == 1 and "could not be written to stdout: No space left" in stderr


def test_an_interruption_says_more_than_a_lost_result(tmp_path):
    assert shell("{} >/dev/full", tmp_path, "interrupted")[0] == 130


def test_a_closed_stream_leaves_its_number_to_no_file(tmp_path):
    work = "lambda argv: sys.exit(os.open(argv[0], os.O_CREAT))"
    code = f"import os, sys; from gptjax.core import cli; cli.run({work}, sys.argv[1:])"
    words = f"'{sys.executable}' -c '{code}' '{tmp_path / 'file'}' <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", words], cwd=ROOT).returncode >= 3


def test_a_reader_that_reads_nothing_holds_nothing_up(monkeypatch):
    monkeypatch.setattr(streams, "_PATIENCE_MS", 100)
    reader, writer = os.pipe()
    stream = streams.ProgressStream(None)
    stream._number = writer
    began = time.monotonic()
    for i in range(2000):
        stream.write(f"line {i} of this run, which nobody reads\n")
    assert time.monotonic() - began < 2
    os.read(reader, 1 << 20)
    stream.write("read again\n")
    text = os.read(reader, 1 << 20).decode()
    os.close(reader)
    stream.write("a reader that is gone\n")
    os.close(writer)
    assert "lines left out: nobody read them" in text and text.endswith("read again\n")


@pytest.mark.parametrize("gone", [None, "closed"])
def test_say_without_a_stderr(gone, monkeypatch, capsys):
    stream = io.StringIO() if gone else None
    if stream:
        stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    cli.say("nothing of this goes to stdout")
    with cli.progress("work") as advance:
        advance(1)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (UserError("wrong"), 2, "error: wrong"),
        (OSError(28, "No space left on device", "/here"), 2, "error: /here: No space left"),
        (KeyboardInterrupt(), 130, ""),
        (BrokenPipeError(32, "Broken pipe"), 2, "Broken pipe"),  # of a socket: never a success
        (RuntimeError("ours"), 1, "RuntimeError: ours"),
        (SystemExit(130), 130, ""),
    ],
)
@pytest.mark.parametrize("debug", [False, True])
def test_exit_codes(error, code, words, debug, capsys):
    def main(argv):
        raise error

    with pytest.raises(SystemExit) as ended:
        cli.run(main, ["--debug"] if debug else [])
    assert ended.value.code == code
    message = capsys.readouterr().err
    assert "Traceback" not in message or debug or code == 1
    assert code == 130 or words in message


def test_reporting_that_fails_is_said_and_the_work_goes_on(capsys):
    with cli.reporting("the chart"):
        raise ZeroDivisionError("no points")
    message = "warning: the chart: ZeroDivisionError: no points; the run goes on\n"
    assert capsys.readouterr().err == message
