"""JSON as people have it: arrays, laid out over lines, odd numbers, keys that are there twice."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptjax.config.build import build_config
from gptjax.config.errors import UserError
from gptjax.data import sources
from gptjax.data.readers.json_objects import count_objects, read_objects

ROWS = [{"text": "a b", "id": 1}, {"text": 'c "d"\nnext', "id": 2}, {"text": "e", "id": 3}]


def open_records(path):
    config = build_config({"data": {"source": "jsonl", "path": str(path)}}).data
    return sources.read_records(config, str(path), "")


LAYOUTS = {
    "one a line": "\n".join(map(json.dumps, ROWS)),
    "blank lines": "\n\n" + "\n\n".join(map(json.dumps, ROWS)) + "\n \n",
    "line ends of Windows": "\ufeff" + "\r\n".join(map(json.dumps, ROWS)),
    "array on a line": json.dumps(ROWS),
    "array": json.dumps(ROWS, indent=2),
    "array, one a line": "[\n" + ",\n".join(map(json.dumps, ROWS)) + "\n]\n",
    "two arrays": json.dumps(ROWS[:1]) + "\n" + json.dumps(ROWS[1:]) + "\n[]\n",
    "laid out over lines": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "one after the other": "".join(map(json.dumps, ROWS)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_gives_the_records_with_their_lines(tmp_path, name):
    text = LAYOUTS[name]
    path = tmp_path / "a.json"
    path.write_bytes(text.encode())
    records = open_records(tmp_path)  # a folder without .jsonl takes .json
    rows = list(records.read())
    assert [row.fields for row in rows] == ROWS
    assert records.count == records.selection.documents == 3
    for row in rows:  # the record begins in the line that is named
        line = text.split("\n")[int(row.where.rpartition(":")[2]) - 1]
        assert line.strip().startswith(("{", "[")) or line.startswith("\ufeff")


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


def lay_out(rows, style, indent):
    objects = [json.dumps(row, indent=indent, ensure_ascii=False) for row in rows]
    styles = {
        "lines": "\n".join(json.dumps(row) for row in rows),
        "array": json.dumps(rows, indent=indent),
        "array by hand": "[" + " ,\n\n".join(objects) + "]\n",
        "over lines": "\n".join(objects),
        "no space": "".join(objects),
    }
    return styles[style]


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.fixed_dictionaries({"text": st.text(), "x": JSON_VALUES}), min_size=1, max_size=4),
    st.sampled_from(["lines", "array", "array by hand", "over lines", "no space"]),
    st.sampled_from([None, 0, 2]),
)
def test_any_values_in_any_layout(tmp_path, rows, style, indent):
    path = tmp_path / "a.json"
    path.write_bytes(lay_out(rows, style, indent).encode())
    records = list(read_objects(path))
    assert json.dumps([r.fields for r in records]) == json.dumps(rows)
    assert count_objects(path) == len(rows)


def test_places_of_an_array(tmp_path):
    (tmp_path / "a.json").write_text('[\n\n {"text": "a"}, {"text": "b"},\n {\n"text": "c"}\n]')
    where = [row.where.rpartition(":")[2] for row in open_records(tmp_path).read()]
    assert where == ["3", "3", "4"]


def test_numbers_stay_as_they_are_written(tmp_path):
    digits = "9" * 5000
    (tmp_path / "a.jsonl").write_text(
        f'{{"text": "a", "id": {digits}, "deep": [1e999], "x": NaN, "y": -1.5e3, "z": 12}}'
    )
    (row,) = open_records(tmp_path).read()
    assert row.text("text") == "a"
    assert row.fields["id"] == digits
    assert row.fields["deep"] == ["1e999"]
    assert (row.fields["y"], row.fields["z"]) == (-1500.0, 12)


def test_a_key_that_is_there_twice_matters_where_it_is_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"text": "a"}\n'
        '{"text": "b", "id": 1, "id": 2, "text": "c", "meta": {"k": [{"x": 1, "x": 2}]}, "n": 1}\n'
    )
    first, second = open_records(tmp_path).read()
    assert first.fields == {"text": "a"} and second.fields == {"n": 1}
    with pytest.raises(UserError, match=r"a.jsonl:2: data.field = 'text' is there twice"):
        second.text("text")
    with pytest.raises(UserError, match=r"task.label = 'meta' has the key 'x' twice"):
        second.text("meta", setting="task.label")
    config = build_config({"data": {"source": "jsonl", "path": str(tmp_path), "field": "n"}})
    with pytest.raises(UserError, match=r"a.jsonl:1 has no text under data.field = 'n'"):
        list(sources.open_source(config.data).documents("train"))


WRONG = {
    "cut": ('{"text": "a"}\n{"text": "b', r"a.jsonl:2 is not JSON: .* it breaks off there"),
    "array cut": ('[{"text": "a"},\n{"text": "b"}\n', r"a.jsonl:3 is not JSON: the array breaks"),
    "no comma": ('[{"text": "a"}\n{"text": "b"}]', r"a.jsonl:2 is not JSON: the array has no c"),
    "a list": ('{"text": "a"}\n["b"]\n', r"a.jsonl:2 is a list, not an object with fields"),
    "in an array": ('[{"text": "a"},\n"b"]', r"a.jsonl:2 is a text, not an object with fields"),
    "numbers": ("[1, 2]\n[3, 4]\n", r"a.jsonl:1 is a number, not an object with fields"),
    "null in place of a row": (
        '{"text": "a"}\nnull\n',
        r"a.jsonl:2 is null, not an object with fields",
    ),
    "single quotes": ("{'text': 'a'}\n", r"a.jsonl:1 is not JSON: .*column 2: JSON has double q"),
    "two later": ('{"text": "a"}\n{"text": "b"} {"text": "c"}\n', r":2 has more .* 14: .*jq -c"),
    "web page": ("<!DOCTYPE html>\n<html>", r"a.jsonl is a web page and not JSON"),
    "deep": ('{"text": ' + "[" * 100_000, r"a.jsonl:1 nests its lists and objects too deeply"),
    "laid out, wrong": ('{\n"text": "a",\n"id": x\n}', r"a.jsonl:3 is not JSON: .* at column 7"),
    "null": ('{"text": null}\n', r"a.jsonl:1: data.field = 'text' is null; fill it or drop"),
    "half a pair": ('{"text": "\\ud800"}\n', r"a.jsonl:1: .* holds half of a UTF-16 pair"),
    "all in one": (
        '{"version": 1, "rows": [{"text": "a"}]}',
        r"a.jsonl:1 has no text .* version, rows; 'rows' is a list of objects: .*jq -c '.rows",
    ),
    "squad": ('{"data": [{"paragraphs": []}]}', r"SQuAD's form is read with data.source = 'squad'"),
    "zeros": ('{"text": "a\0"}\n', r"a.jsonl:1 is not JSON: Invalid control character at c"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named_with_its_line(tmp_path, name):
    content, message = WRONG[name]
    (tmp_path / "a.jsonl").write_text(content)
    config = build_config({"data": {"source": "jsonl", "path": str(tmp_path)}}).data
    with pytest.raises(UserError, match=message) as error:
        list(sources.open_source(config).documents("train"))
    assert len(str(error.value).splitlines()) == 1


def test_json_beside_jsonl_is_counted_and_not_read(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "about.json").write_text('{"licence": "MIT"}')
    records = open_records(tmp_path)
    assert records.count == 1
    (entry,) = records.selection.passed_over
    assert (entry.reason, entry.names) == ("of another suffix", ("about.json",))
