"""Files: what a full disk or a damaged cache means, and for whom."""

import errno
import json
import os
import resource

import numpy as np
import pytest

from gptjax.config.errors import UserError
from gptjax.core import cli, files


@pytest.fixture
def small_files():
    """No file may grow past 4 KB, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limit[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)


@pytest.mark.parametrize("array", [np.arange(5, dtype=np.uint16), np.zeros(0, np.int64)])
def test_arrays_are_what_numpy_would_write(array, tmp_path):
    files.write_array(tmp_path / "a.npy", array)
    np.save(tmp_path / "b.npy", array)
    assert (tmp_path / "a.npy").read_bytes() == (tmp_path / "b.npy").read_bytes()


def test_a_full_disk_names_the_file_and_a_way_out(tmp_path, small_files, monkeypatch):
    path = tmp_path / "a.npy"
    with pytest.raises(OSError) as raised:
        files.write_array(path, np.zeros(10_000))
    assert files.explain(raised.value).startswith(f"{path}: File too large (a limit of this shell")
    assert not list(tmp_path.iterdir())
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    assert "No space left on device (" in files.explain(full)
    assert "GPTJAX_CACHE" not in files.explain(full)
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path))
    assert "GPTJAX_CACHE=FOLDER" in files.explain(full)
    nameless = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert "free)" not in files.explain(nameless)  # of which disk is unknown


def test_an_error_of_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError) as raised, files.atomic(tmp_path / "a"):
        open(tmp_path / "other")  # noqa: SIM115 - never opened
    assert raised.value.filename == str(tmp_path / "other")


def test_what_cannot_be_cached_is_said_once_and_what_is_damaged_goes(tmp_path, capsys):
    path = tmp_path / "cache" / "entry"
    assert files.read_cached(path) is None and capsys.readouterr().err == ""
    assert files.write_cached(path, b"data") and files.read_cached(path) == b"data"
    os.truncate(path, 66)
    assert files.read_cached(path) is None and not path.exists()
    assert f"warning: {path}: damaged; set aside as" in capsys.readouterr().err
    path.mkdir()
    assert files.read_cached(path) is None and not path.exists()
    (tmp_path / "file").write_text("")
    assert not files.write_cached(tmp_path / "file" / "entry", b"data")
    assert not files.write_cached(tmp_path / "file" / "entry2", b"data")
    assert capsys.readouterr().err.count("GPTJAX_CACHE names another folder") == 1


def test_a_checksum_that_cannot_be_remembered_is_computed_again(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("text")
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "file"))
    expected = files.sha256(tmp_path / "file")
    assert files.sha256_once(tmp_path / "file", expected)
    assert not files.sha256_once(tmp_path / "file", "0" * 64)


def test_a_report_that_cannot_be_written_is_said_once(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "1.txt"
    assert [files.report_text(path, "text") for _ in range(2)] == [False, False]
    assert capsys.readouterr().err.count("could not be written: Not a directory") == 1
    (tmp_path / "run.json").symlink_to("run.json")
    assert files.report_text(tmp_path / "run.json", "text")
    assert (tmp_path / "run.json").read_text() == "text"


def test_the_lock_works_whatever_its_file_holds(tmp_path, monkeypatch, capsys):
    (tmp_path / ".lock").write_bytes(b"\xff\xfe")
    with files.lock(tmp_path):
        holder = json.loads((tmp_path / ".lock").read_text())
        assert holder["pid"] == os.getpid()
        (tmp_path / ".lock").write_bytes(b"\xff")
        with pytest.raises(UserError, match="in use by another run"), files.lock(tmp_path):
            pass
    (tmp_path / "b" / ".lock").mkdir(parents=True)
    with files.lock(tmp_path / "b"):
        assert (tmp_path / "b" / ".lock").is_file()

    def no_locks(file, flags):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with files.lock(tmp_path):
        assert "its disk has no locks" in capsys.readouterr().err


def test_the_lock_needs_no_space(tmp_path):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit[1]))
    try:
        with files.lock(tmp_path):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_progress_is_said_once(capsys):
    for _ in range(2):
        cli.say_once("only once in a process, this")
    assert capsys.readouterr().err == "only once in a process, this\n"


def test_an_array_is_read_as_it_was_whatever_its_order(tmp_path):
    array = np.arange(6).reshape(2, 3)
    for name, stored in (("rows", array), ("columns", np.asfortranarray(array)), ("one", array[0])):
        files.write_array(tmp_path / f"{name}.npy", stored)
        np.testing.assert_array_equal(np.load(tmp_path / f"{name}.npy"), stored)
