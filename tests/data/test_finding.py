"""Which files a path means, and that what is passed over is named."""

import os

import pytest

from gptjax.config.errors import UserError
from gptjax.data import selection
from gptjax.data.readers.finding import find_files

SUFFIXES = (".txt", ".md")


def write(path, text=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if text is not None else f"text of {path.name}")
    return path


def names(found, root):
    return [str(p.relative_to(root)) for p in found.paths]


def left_out(found):
    return {entry.reason: entry.names for entry in found.selection.passed_over}


def test_links_lead_into_a_corpus_once(tmp_path):
    corpus = tmp_path / "corpus"
    write(corpus / "a.txt")
    write(corpus / "sub" / "b.txt")
    write(tmp_path / "store" / "c.txt")
    (corpus / "file.txt").symlink_to(tmp_path / "store" / "c.txt")
    (corpus / "more").symlink_to("../store")
    (corpus / "again").symlink_to("sub")
    (corpus / "sub" / "loop").symlink_to("..")
    (corpus / "above").symlink_to("../..")
    (corpus / "gone.txt").symlink_to("nothing")
    (corpus / "self.txt").symlink_to("self.txt")
    for path in (corpus, corpus / "**" / "*.txt"):
        found = find_files(str(path), SUFFIXES)
        assert names(found, corpus) == ["a.txt", "file.txt", "sub/b.txt"]
        assert left_out(found) == {
            "broken links": ("gone.txt", "self.txt"),
            "links to a folder above": ("above", "sub/loop"),
            "second names of a folder": ("again",),
            "copies of another file": ("more/c.txt = file.txt",),
        }
    assert find_files(str(corpus / "more"), SUFFIXES).paths == [corpus / "more" / "c.txt"]


def test_hidden_files_and_editor_copies_are_taken_by_name_alone(tmp_path):
    private = [".hidden.txt", "._a.txt", ".git/c.txt", ".ipynb_checkpoints/a-checkpoint.txt"]
    copies = ["a.txt~", "#a.txt#", ".a.txt.swp", "a.txt.bak", "a.txt.orig"]
    for name in ["a.txt", *private, *copies]:
        write(tmp_path / name)
    for path in (tmp_path, tmp_path / "*", tmp_path / "**"):
        found = find_files(str(path), SUFFIXES)
        assert names(found, tmp_path) == ["a.txt"]
        assert set(left_out(found)) == {"hidden", "editor copies"}
        counts = {entry.reason: entry.count for entry in found.selection.passed_over}
        assert counts == {"hidden": 5, "editor copies": 4}
    for name in [*private, *copies]:
        assert names(find_files(str(tmp_path / name), SUFFIXES), tmp_path) == [name]
    assert names(find_files(str(tmp_path / ".*.txt"), SUFFIXES), tmp_path) == [
        "._a.txt",
        ".hidden.txt",
    ]
    assert names(find_files(str(tmp_path / "*.bak"), SUFFIXES), tmp_path) == ["a.txt.bak"]
    assert names(find_files(str(tmp_path / ".git"), SUFFIXES), tmp_path) == [".git/c.txt"]


def test_suffixes_in_any_case_and_the_rest_is_counted(tmp_path):
    for name in ("A.TXT", "b.Md", "c.TXT.GZ", "d.pdf", "e.png", "f", "sub/g.csv", "h.jsonl"):
        write(tmp_path / name)
    found = find_files(str(tmp_path), SUFFIXES)
    assert names(found, tmp_path) == ["A.TXT", "b.Md", "c.TXT.GZ"]
    (entry,) = found.selection.passed_over
    assert (entry.reason, entry.count) == ("of another suffix", 5)
    assert selection.describe({"data": found.selection}) == [
        f"data: {tmp_path}: 3 files of 41 bytes, 0 documents",
        "data: passed over 5 of another suffix (d.pdf, e.png, f, ...)",
    ]


def test_empty_files_and_copies_are_passed_over(tmp_path):
    write(tmp_path / "a.txt", "the same text")
    write(tmp_path / "sub" / "b.txt", "the same text")
    write(tmp_path / "c.txt", "")
    found = find_files(str(tmp_path), SUFFIXES)
    assert names(found, tmp_path) == ["a.txt"]
    assert left_out(found) == {
        "copies of another file": ("sub/b.txt = a.txt",),
        "empty": ("c.txt",),
    }
    both = find_files(str(tmp_path), SUFFIXES, keep_duplicates=True)
    assert names(both, tmp_path) == ["a.txt", "sub/b.txt"]
    with pytest.raises(UserError, match=r"c.txt is empty"):
        find_files(str(tmp_path / "c.txt"), SUFFIXES)


def test_globs(tmp_path):
    for name in ("1/a.txt", "2/b.txt", "2/deep/c.txt", "x[1].txt", "pair/d.rst"):
        write(tmp_path / name)

    def found(pattern):
        return names(find_files(str(tmp_path / pattern), SUFFIXES), tmp_path)

    assert found("?/*.txt") == ["1/a.txt", "2/b.txt"]
    assert found("**/*.txt") == ["1/a.txt", "2/b.txt", "2/deep/c.txt", "x[1].txt"]
    assert found("2/**") == ["2/b.txt", "2/deep/c.txt"]
    assert found("**/deep/*") == ["2/deep/c.txt"]
    assert found("x[1].txt") == ["x[1].txt"]  # a file of that name, not a glob
    assert found("pair/*") == ["pair/d.rst"]  # a glob takes any suffix
    flat = find_files(str(tmp_path / "2" / "*"), SUFFIXES)
    assert left_out(flat) == {"folders that the pattern matches (add /**)": ("deep",)}
    for pattern in ("*.nothing", "nowhere/*.txt", "nowhere"):
        with pytest.raises(UserError, match=r"no file there .looking for \*.txt \*.md."):
            found(pattern)


def test_what_is_no_file_is_named(tmp_path):
    write(tmp_path / "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    found = find_files(str(tmp_path), SUFFIXES)
    assert left_out(found) == {"pipes or devices": ("pipe.txt",)}
    with pytest.raises(UserError, match=r"pipe.txt is not a regular file"):
        find_files(str(tmp_path / "pipe.txt"), SUFFIXES)


def test_a_folder_below_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    write(tmp_path / "a.txt")
    write(tmp_path / "lost+found" / "b.txt")
    listdir = os.listdir  # the tests may run as root, whom no permission stops

    def refusing(folder):
        if folder == refused:
            raise PermissionError(13, "Permission denied", str(folder))
        return listdir(folder)

    monkeypatch.setattr(os, "listdir", refusing)
    refused = tmp_path / "lost+found"
    found = find_files(str(tmp_path), SUFFIXES)
    assert names(found, tmp_path) == ["a.txt"]
    assert left_out(found) == {"folders that may not be read": ("lost+found",)}
    refused = tmp_path
    with pytest.raises(UserError, match=r"Permission denied"):
        find_files(str(tmp_path), SUFFIXES)


def test_odd_names_are_said_on_one_line(tmp_path):
    write(tmp_path / "a.txt")
    write(tmp_path / "line\nend.pdf")
    write(tmp_path / "caf\udce9.pdf", "x")  # a byte that is no UTF-8
    found = find_files(str(tmp_path), SUFFIXES)
    assert left_out(found) == {"of another suffix": ("caf\\udce9.pdf", "line\\nend.pdf")}
