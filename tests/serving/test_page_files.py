"""The files of the page: all are served, none reaches elsewhere or writes HTML of text."""

import re
from urllib.request import urlopen

import pytest
from small_server import serving

from gptjax.serving import page_files

pytest.importorskip("uvicorn", reason="the extra serve is not installed")


def test_every_file_is_served_and_every_reference_is_one_of_them():
    files = sorted(page_files.FOLDER.iterdir())
    with serving() as server:
        for path in files:
            answer = urlopen(f"{server.url}page/{path.name}")
            assert answer.read() == path.read_bytes()
            assert answer.headers["content-type"] == page_files.TYPES[path.suffix]
        page = urlopen(server.url)
        assert page.read() == (page_files.FOLDER / "index.html").read_bytes()
        assert "default-src 'none'" in page.headers["content-security-policy"]
    text = "\n".join(path.read_text() for path in files)
    names = re.findall(r'(?:src|href)="page/([^"]+)"|from "\./([^"]+)"', text)
    assert {a or b for a, b in names} == {p.name for p in files} - {"index.html"}


def test_no_file_names_another_address_or_writes_html():
    for path in page_files.FOLDER.iterdir():
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|innerHTML|insertAdjacentHTML|document\.write|eval\(", text)
