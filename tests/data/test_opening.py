"""What a file holds decides how it is read; what is no text is named with a way out."""

import bz2
import gzip
import io
import lzma
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

from gptjax.config.build import build_config
from gptjax.config.errors import UserError
from gptjax.data import sources
from gptjax.data.readers import opening
from gptjax.data.readers.finding import find_files


def zstd_compress(data):
    try:
        from compression import zstd
    except ImportError:
        zstandard = pytest.importorskip("zstandard")
        return zstandard.ZstdCompressor(write_checksum=True).compress(data)
    return zstd.compress(data, options={zstd.CompressionParameter.checksum_flag: 1})


COMPRESS = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress, "zst": zstd_compress}
TEXT = "été 東京\nline two\n" * 5000
CONTENT = {
    "text": ("txt", TEXT, {}),
    "jsonl": ("jsonl", '{"text": "a b"}\n{"text": "c d"}\n', {}),
    "csv": ("csv", 'text,label\n"a, b",x\nc d,y\n', {}),
    "lines": ("txt", "a b\nc d\n", dict(columns=["text"])),
    "squad": (
        "json",
        (
            '{"data": [{"paragraphs": [{"context": "a b", "qas": '
            '[{"id": 1, "question": "?", "answers": []}]}]}]}'
        ),
        dict(field="context"),
    ),
}


def documents(source, path, **data):
    data = {"source": source, "path": str(path), "eval_fraction": 0.0, **data}
    return list(sources.open_source(build_config({"data": data}).data).documents("train"))


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("source", CONTENT)
def test_every_format_is_read_compressed(tmp_path, source, ending):
    suffix, content, data = CONTENT[source]
    plain = tmp_path / "plain" / f"a.{suffix}"
    packed = tmp_path / "packed" / f"A.{suffix.upper()}.{ending.upper()}"
    misnamed = tmp_path / "misnamed" / f"a.{suffix}"
    for path in (plain, packed, misnamed):
        path.parent.mkdir()
    plain.write_text(content)
    half = len(content.encode()) // 2
    members = [content.encode()[:half], content.encode()[half:]]  # as `cat a.gz b.gz` makes them
    packed.write_bytes(b"".join(map(COMPRESS[ending], members)))
    misnamed.write_bytes(COMPRESS[ending](content.encode()))
    expected = documents(source, plain, **data)
    assert expected and "".join(expected)
    assert documents(source, packed.parent, **data) == expected
    assert documents(source, misnamed.parent, **data) == expected


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_damaged_compressed_file_is_named_with_the_place(tmp_path, ending):
    path = tmp_path / f"a.txt.{ending}"
    whole = COMPRESS[ending](TEXT.encode() + bytes(range(32, 127)) * 99)
    wrong = {
        "cut": whole[:-9],
        "flipped": whole[: len(whole) // 2] + b"\x55\xaa\x55" + whole[len(whole) // 2 + 3 :],
        "rest": whole + b"and more that is not compressed",
    }
    for content in wrong.values():
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"a.txt.{ending} is a damaged or incomplete"):
            opening.read_text(path)
    path.write_bytes(b"\x01\x8b" + whole[2:])
    with pytest.raises(UserError, match=rf"does not begin as a .{ending} file does"):
        opening.read_text(path)
    path.write_text(TEXT)  # a browser unpacked it and left the name
    assert opening.read_text(path) == TEXT


def test_a_missing_zstd_package_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(b"\x28\xb5\x2f\xfd\x04\x58")
    for name in ("compression", "zstandard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r"a.txt is compressed with zstd: .*'gptjax\[zstd\]'$"):
        documents("text", tmp_path)


def test_compressed_files_of_nothing_and_packed_copies_are_passed_over(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    for ending in ("gz", "bz2", "xz"):
        (tmp_path / f"a.txt.{ending}").write_bytes(COMPRESS[ending](TEXT.encode()))
        (tmp_path / f"empty.txt.{ending}").write_bytes(COMPRESS[ending](b""))
    found = find_files(str(tmp_path), (".txt",))
    assert [p.name for p in found.paths] == ["a.txt"]
    assert [(e.reason, e.count) for e in found.selection.passed_over] == [
        ("copies of another file", 3),
        ("empty", 3),
    ]


def tar(text):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        info = tarfile.TarInfo("a.txt")
        info.size = len(text)
        file.addfile(info, io.BytesIO(text))
    return buffer.getvalue()


def zipped(text):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.txt", text)
    return buffer.getvalue()


NO_TEXT = {
    "utf-16": ("\ufeffplain".encode("utf-16-le"), r"is UTF-16 text: .*iconv -f UTF-16 -t UTF-8"),
    "utf-16-be": ("\ufeffplain".encode("utf-16-be"), r"is UTF-16 text: .*iconv -f UTF-16 "),
    "utf-32": ("\ufeffplain".encode("utf-32-le"), r"is UTF-32 text: .*iconv -f UTF-32 "),
    "no mark": ("plain text".encode("utf-16-le"), r"is UTF-16 text: .*iconv -f UTF-16LE "),
    "no mark, be": ("plain text".encode("utf-16-be"), r"is UTF-16 text: .*iconv -f UTF-16BE "),
    "packed": (
        gzip.compress("plain text".encode("utf-16")),
        r"is UTF-16 text: .*zcat '.*a.txt' \| iconv -f UTF-16 -t UTF-8 > converted.txt",
    ),
    "pdf": (b"%PDF-1.7 ...", r"is a PDF: .*pdftotext"),
    "zip": (zipped(b"plain"), r"is a zip archive or Office document: unpack it"),
    "parquet": (b"PAR1\x15\x04", r"is a parquet file: .*--config.data.source=parquet"),
    "tar": (tar(b"plain"), r"is a tar archive: unpack it"),
    "tar.gz": (gzip.compress(tar(b"plain")), r"is a tar archive: unpack it"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid", r"is a pointer of Git LFS.*pull"),
    "latin": ("un café noir".encode("latin-1"), r"is not UTF-8: byte 0xe9 at offset 6"),
    "cut": ("un café".encode()[:-1], r"is not UTF-8: byte 0xc3 at offset 6.*cut off"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text_is_named_with_a_way_out(tmp_path, name):
    content, message = NO_TEXT[name]
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(UserError, match="a.txt " + message) as error:
        documents("text", tmp_path)
    assert len(str(error.value).splitlines()) == 1
    if "iconv -f UTF" in str(error.value) and shutil.which("iconv"):  # it works
        command = str(error.value).partition("such as with ")[2]
        subprocess.run(command, shell=True, check=True, cwd=tmp_path)
        assert documents("text", tmp_path / "converted.txt")[0].startswith("plain")


def test_web_pages_are_read_and_named(tmp_path, capsys):
    page = "\ufeff\n<!DOCTYPE HTML>\n<html><body>words</body></html>"
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"{page}{name}")
    (tmp_path / "c.txt").write_text("The tag <html> is text here.")
    assert len(documents("text", tmp_path)) == 3
    assert f"2 files in {tmp_path} hold a web page, such as a.txt" in capsys.readouterr().err


def test_text_that_looks_odd_is_text(tmp_path):
    for content in ("\ufeffmarked", "a\0b zeros in text", "PK is how it begins", "BZh is no bzip2"):
        (tmp_path / "a.txt").write_text(content)
        assert documents("text", tmp_path) == [content.removeprefix("\ufeff")]
