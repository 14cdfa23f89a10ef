"""JAX's cache on disk: a damaged entry goes, a folder that cannot be made stops nothing."""

import warnings

import jax
import pytest

from gptjax.runtime import compile_cache

others = []  # warnings that are shown as ever


@pytest.fixture
def folder(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "xla"))
    (tmp_path / "xla").mkdir()
    monkeypatch.setattr(warnings, "showwarning", lambda message, *rest: others.append(str(message)))
    others.clear()
    yield tmp_path / "xla"
    jax.config.update("jax_compilation_cache_dir", before)


def say(text):
    warnings.showwarning(UserWarning(text), UserWarning, "compiler.py", 1)


def test_a_damaged_entry_is_removed_and_named_once(folder, capsys):
    for name in ("jit_step-12ab-cache", "jit_step_two-34cd-cache", "jit_step-12ab-atime"):
        (folder / name).write_bytes(b"")
    compile_cache.enable_compile_cache()
    compile_cache.enable_compile_cache()  # a second time changes nothing
    text = "Error reading persistent compilation cache entry for 'jit_step': ZstdError: incomplete"
    say(text)
    say(text)
    say("something else")
    assert [path.name for path in folder.iterdir()] == ["jit_step_two-34cd-cache"]
    message = capsys.readouterr().err
    assert message.count("the entry of jit_step was damaged; it is made anew") == 1
    assert "ZstdError" not in message and others == ["something else"]


def test_a_cache_that_cannot_be_written_is_said_once(folder, capsys):
    compile_cache.enable_compile_cache()
    for name in ("jit_a", "jit_b"):
        say(f"Error writing persistent compilation cache entry for '{name}': OSError: full disk")
    message = capsys.readouterr().err
    assert message.count("compiled programs cannot be stored: OSError: full disk") == 1


def test_a_cache_folder_that_is_a_file_is_said_once(folder, capsys):
    folder.rmdir()
    folder.write_text("")
    compile_cache.enable_compile_cache()
    for what in ("reading", "writing"):
        say(f"Error {what} persistent compilation cache entry for 'jit_f': NotADirectoryError: f")
    message = f"warning: {folder} is not a folder: compiled programs are not kept\n"
    assert capsys.readouterr().err == message and folder.is_file()


def test_a_cache_folder_that_cannot_be_made_stops_nothing(folder, tmp_path, monkeypatch, capsys):
    jax.config.update("jax_compilation_cache_dir", None)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GPTJAX_CACHE", str(tmp_path / "file"))
    compile_cache.enable_compile_cache()
    assert jax.config.jax_compilation_cache_dir is None
    assert "it goes without this cache" in capsys.readouterr().err
