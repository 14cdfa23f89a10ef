"""The report: every number is there, nothing is fetched, and baselines count what they say."""

import dataclasses
import itertools
import json
import math
from collections import Counter
from html.parser import HTMLParser
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import make_config

from gptjax.config import schema
from gptjax.data import loader, shards
from gptjax.evaluation.held_out import held_out_scores
from gptjax.runtime.mesh import make_mesh
from gptjax.training import baselines, charts, report
from gptjax.training.charts import Point

VOID = {"meta", "input", "br", "link", "img"}


class Page(HTMLParser):
    """Checks that tags are closed in order, and collects the text and the attributes."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words, self.attributes, self.tags = [], [], [], Counter()
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.words.append(data)

    def of(self, name):
        return [value for _, attribute, value in self.attributes if attribute == name]


@pytest.fixture
def prepared(tmp_path, corpus):
    config = make_config(
        data=dict(source="text", path=str(corpus), eval_fraction=0.1),
        train=dict(steps=12, batch_size=4, eval_batches=3),
    )
    return config, shards.ensure(config, None)


def workdir_of(folder, config, records, **run):
    folder.mkdir()
    (folder / "config.json").write_text(schema.to_json(config))
    (folder / "run.json").write_text(json.dumps({"step": 12, "status": "finished", **run}))
    lines = [json.dumps({"step": step, "time": 0.0, **values}) for step, values in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "samples").mkdir()
    (folder / "samples" / "12.txt").write_text("<b>a & b</b>")
    return folder


RECORDS = [
    (4, {"train/loss": 5.4321, "train/lr": 1e-3, "train/grad_norm": 1.5}),
    (6, {"eval/loss": 5.2109, "eval/bits_per_byte": 7.5432}),
    (8, {"train/loss": 4.8765, "train/lr": 0.0, "train/grad_norm": "nan"}),
    (
        12,
        {
            "train/loss": 4.1,
            "train/lr": 5e-4,
            "train/grad_norm": 0.7,
            "eval/loss": 4.3,
            "eval/bits_per_byte": 6.9,
        },
    ),
]


def test_every_number_is_on_the_page_and_nothing_is_fetched(tmp_path, prepared):
    config, data = prepared
    folder = workdir_of(tmp_path / "a & b", config, RECORDS, devices="1 x cpu")
    report.write(folder, data)
    text = (folder / "report.html").read_text()
    page = Page(text)
    words = " ".join(" ".join(page.words).split())
    for _, values in RECORDS:
        for name, value in values.items():
            if value != "nan":
                assert charts.number(value) in words, name
    stored = json.loads((folder / "run.json").read_text())["baselines"]
    assert len(stored) == 3
    for name, value in (stored | {"this model": 6.9}).items():
        assert name in words
        assert f"{value:.3f}" in words
    for path, _, _ in schema.all_settings():
        assert path in words
    assert "<b>a & b</b>" in words
    assert "a & b" in words
    assert not [t for t in page.tags if t in ("link", "img", "iframe", "object")]
    assert not page.of("src") and not page.of("href")
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert "prefers-color-scheme: dark" in text


def test_charts_are_described_and_have_values_to_hover(tmp_path, prepared):
    config, _ = prepared
    folder = workdir_of(tmp_path / "run", config, RECORDS)
    report.write(folder, None)
    page = Page((folder / "report.html").read_text())
    assert page.tags["svg"] == page.tags["title"] - 1 == page.tags["desc"] > 4
    ids = page.of("id")
    assert len(ids) == len(set(ids))
    for labels in page.of("aria-labelledby"):
        assert set(labels.split()) <= set(ids)
    hover = json.loads(page.of("data-hover")[0])
    assert [name for name, _ in hover] == ["train", "held out"]
    assert [text for _, _, text in hover[0][1]] == [
        "step 4: 5.432",
        "step 8: 4.877",
        "step 12: 4.1",
    ]
    assert "Bits per byte" not in " ".join(page.words)  # nothing to compare with


def test_a_run_without_records_has_a_report(tmp_path, prepared):
    config, _ = prepared
    folder = workdir_of(tmp_path / "run", config, [])
    (folder / "metrics.jsonl").unlink()
    report.write(folder, None)
    assert Page((folder / "report.html").read_text()).tags["svg"] == 0


def test_baselines_follow_the_step_of_a_run_that_went_on(tmp_path, prepared):
    config, data = prepared
    folder = workdir_of(tmp_path / "run", config, RECORDS, step=1)
    report.write(folder, data)
    before = json.loads((folder / "run.json").read_text())["baselines"]
    report.mark(folder, step=12)
    report.write(folder, data)
    after = json.loads((folder / "run.json").read_text())["baselines"]
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["bigram model of the tokens that the GPT has read"]
    assert after[changed[0]] < before[changed[0]]  # it has counted more


def numbered(total, length):
    """A split whose token at i is i."""
    half = total // 2
    tokens = [np.arange(half), np.arange(half, total)]
    return loader.Windows(tokens, np.array([0, half, total]), np.zeros(0, int), length, False)


def pairs_of(segments):
    """All pairs of neighbours, each time that they are there."""
    pairs = []
    for segment in segments:
        pairs += itertools.pairwise(segment.tolist())
    return pairs


@pytest.mark.parametrize(("total", "steps"), [(101, 1), (101, 2), (101, 30), (1000, 3)])
def test_the_tokens_read_are_those_of_the_batches(total, steps):
    split, size, seed = numbered(total, length=7), 3, 5
    batches = loader.train_batches(split, seed=seed, batch_size=size, rows=range(size), start=0)
    read = set()
    for _ in range(steps):
        batch = next(batches)
        read |= set(zip(batch.tokens.ravel().tolist(), batch.targets.ravel().tolist(), strict=True))
    batches.close()
    segments = baselines.segments_read(split, seed=seed, examples=range(steps * size))
    counted = pairs_of(segments)
    assert sorted(counted) == sorted(read)  # each once


def test_bigram_bits_equal_a_count_by_hand():
    random = np.random.default_rng(0)
    segments = [random.integers(0, 6, n) for n in (40, 1, 25)]
    held_out, vocab = random.integers(0, 7, 50), 7
    tokens = np.concatenate(segments).tolist()
    pairs = Counter(pairs_of(segments))
    bits = 0.0
    for a, b in zip(held_out[:-1].tolist(), held_out[1:].tolist(), strict=True):
        unigram = (tokens.count(b) + 1) / (len(tokens) + vocab)
        followers = {y: n for (x, y), n in pairs.items() if x == a}
        total = sum(followers.values())
        p = unigram
        if total:
            p = max(followers.get(b, 0) - 0.75, 0) / total + 0.75 * len(followers) / total * unigram
        bits -= math.log2(p)
    assert baselines.bigram_bits(segments, held_out, vocab) == pytest.approx(bits, rel=1e-12)


def test_a_baseline_that_counts_a_sample_says_so(prepared, monkeypatch):
    config, data = prepared
    monkeypatch.setattr(baselines, "MAX_TOKENS", 1 << 8)
    names = list(baselines.baselines(data, config, step=12))
    assert names[1].startswith("bigram model of the first 256 of ")
    assert names[2].endswith("(of 16 of its 48 windows)")


def test_thin_lines_keep_their_extremes():
    points = [Point(step, math.sin(step)) for step in range(5000)] + [Point(5000, 9.0)]
    thinned = charts.thin(points, 100)
    assert len(thinned) <= 100
    assert thinned == sorted(thinned)
    assert {max(p.value for p in points), min(p.value for p in points)} <= {
        p.value for p in thinned
    }


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (2.2, 8.3), (20, 430), (1e-5, 3e-5)])
def test_ticks_are_round_and_inside(low, high):
    for values in (charts.ticks(low, high, count=5), charts.log_ticks(low or 0.01, high)):
        assert 2 <= len(values) <= 16
        assert all(low - 1e-12 <= v <= high + 1e-12 for v in values)
        assert values == sorted(values)


def test_a_chart_needs_two_points_and_a_logarithm_positive_ones():
    assert charts.make_chart("t", "u", {"a": [Point(1, 2.0)]}) is None
    assert charts.make_chart("t", "u", {"a": [Point(1, 2.0), Point(2, math.nan)]}) is None
    zeros = charts.make_chart("t", "u", {"a": [Point(1, 0.0), Point(2, 0.0)]}, log="y")
    assert charts.draw(zeros) is not None
    assert charts.draw(zeros, log=True) is None
    flat = charts.make_chart("t", "u", {"a": [Point(0, 2.0), Point(2, 2.0)]}, log="xy")
    assert charts.draw(flat) and charts.draw(flat, log=True)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", "folder", "loop"])
def test_a_damaged_run_json_is_set_aside_and_begun_anew(content, tmp_path, capsys):
    path = tmp_path / "run.json"
    if content == "folder":
        (path / "full").mkdir(parents=True)
    elif content == "loop":
        path.symlink_to(path)
    else:
        path.write_bytes(content)
    report.mark(tmp_path, status="running")
    report.mark(tmp_path, step=3)
    assert json.loads(path.read_text()) == {"status": "running", "step": 3}
    (aside,) = (tmp_path / "damaged").iterdir()
    assert capsys.readouterr().err.count(str(aside)) == 1


def test_what_stands_in_the_place_of_records_is_set_aside(tmp_path, capsys):
    (tmp_path / "config.json").mkdir()
    (tmp_path / "tb").write_text("")
    (tmp_path / "samples").symlink_to("samples")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    report.clear_way(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"damaged", "tokenizer", "metrics.jsonl"}
    assert capsys.readouterr().err.count("set aside as") == 3


@pytest.mark.parametrize("fault", ["page", "file", "sample"])
def test_a_report_that_cannot_be_made_ends_nothing(fault, tmp_path, prepared, monkeypatch, capsys):
    config, data = prepared
    folder = workdir_of(tmp_path / "run", config, [(12, {"eval/bits_per_byte": 2.0})])
    if fault == "page":
        (folder / "config.json").write_text("")
    elif fault == "file":
        full = OSError(28, "No space left on device")
        monkeypatch.setattr(report.files, "write_text", Mock(side_effect=full))
    else:
        (folder / "samples" / "13.txt").write_bytes(b"\xff text")
    assert report.write(folder, data) == (fault == "sample")
    message = capsys.readouterr().err
    assert ("report.html" in message) == (fault != "sample")


def test_held_out_documents_without_text_have_no_bits_per_byte(prepared, one_device):
    """As earlier versions prepared them."""
    config, data = prepared
    empty = shards._write_split(iter(["", ""]), data.tokenizer, data.folder, "empty", 1000)
    data = dataclasses.replace(data, splits={**data.splits, "eval": list(empty)})
    assert baselines.baselines(data, config, step=12) == {}
    split = loader.Windows.of(data, "eval", config.length, mask_documents=True)

    def scores(weight):
        step = lambda params, batch, frozen: (2.0 * weight, weight, 0.0)
        mesh = make_mesh(config, one_device)
        return held_out_scores(
            config, mesh, split, data.tokenizer, step, None, None, before_batch=lambda: None
        )

    assert scores(1.0).keys() == {"eval/loss", "eval/perplexity"}
    assert scores(0.0) == {}  # no target: no evaluation
