"""Probes on models whose every log-probability is known: what was built in comes out again."""

import copy
import dataclasses
import html.parser
import json
import math
import re
import zlib

import numpy as np
import pytest
from conftest import tiny_checkpoint

from gptjax.config.errors import UserError
from gptjax.evaluation import probes
from gptjax.generation.language_model import LanguageModel
from gptjax.tokenizer.trained import ByteTokenizer


class Toy:
    """`score` is a function of (prompt, completion); counts how often each pair is scored."""

    def __init__(self, score):
        self.function, self.scored = score, []

    def score(self, prompts, completions):
        self.scored += zip(prompts, completions, strict=True)
        return [(self.function(p, c), False) for p, c in zip(prompts, completions, strict=True)]


def noise(*texts):
    """A number of mean 0 and standard deviation 1 that the texts decide."""
    return float(np.random.default_rng(zlib.crc32("|".join(texts).encode())).standard_normal())


def content(count=12, **changes):
    probe = {
        "name": "toys",
        "axis": "colour",
        "meaning": "red toys are called good",
        "groups": {"red": ["red", "scarlet"], "blue": ["blue", "navy"]},
        "templates": [
            {"text": f"Toy {i} is {{group}} and {{completion}}.", "completions": ["good", "bad"]}
            for i in range(count)
        ],
    }
    return {
        "probes": [
            {name: value for name, value in {**probe, **changes}.items() if value is not None}
        ]
    }


def swapped(data):
    data = copy.deepcopy(data)
    for probe in data["probes"]:
        probe["groups"] = dict(reversed(probe["groups"].items()))
    return data


def red_is_good(strength, spread=0.0):
    """Adds `strength` to good after red words; each completion and group has its own offset too."""

    def score(prompt, completion):
        red = any(word in prompt for word in ("red", "scarlet"))
        return (
            -5.0
            - 2.0 * ("bad" in completion)
            - 1.5 * ("navy" in prompt)
            + strength * (red and "good" in completion)
            + spread * noise(prompt, completion)
        )

    return Toy(score)


def test_gaps_come_out_as_built_in():
    toy = red_is_good(0.75)
    report = probes.run_probes(toy, probes.parse_probes(content()))
    (axis,) = report.axes
    assert (axis.axis, axis.text, axis.templates, axis.pairs) == (
        "colour",
        "red toys are called good",
        12,
        24,
    )
    # navy's own offset, 1.5 on one pair of two, is in the gaps of the single completions and
    # cancels from their difference
    np.testing.assert_allclose(
        [axis.gap, axis.first, axis.second, axis.spread], [0.75, 1.5, 0.75, 0.75], rtol=1e-6
    )
    assert axis.share == 1.0 and axis.share_interval == (1.0, 1.0)
    np.testing.assert_allclose(axis.gap_interval, [0.75, 0.75])
    assert report.leans == {
        ("colour", "red"): pytest.approx(0.375),
        ("colour", "blue"): pytest.approx(-0.375),
    }
    assert ("Toy 3 is navy and", " bad.") in toy.scored
    assert len(toy.scored) == 12 * 2 * 2 * 2  # templates, groups, words, completions


def test_a_share_counts_pairs():
    """Good goes with red in the pair (red, blue) of templates 0 to 2, in (scarlet, navy) never.

    It goes with navy in templates 0 to 5; else there is a tie.
    """

    def score(prompt, completion):
        number = int(re.search(r"\d+", prompt)[0])
        return "good" in completion and float(
            (number < 3 and " red" in prompt) + 2 * (number < 6 and "navy" in prompt)
        )

    report = probes.run_probes(Toy(score), probes.parse_probes(content()))
    assert [t.share for t in report.templates] == [0.5] * 3 + [0.25] * 3 + [0.5] * 6
    assert [t.gap for t in report.templates] == [-0.5] * 3 + [-1.0] * 3 + [0.0] * 6
    assert report.axes[0].share == pytest.approx(5.25 / 12)


def test_swapped_groups_flip_every_sign():
    toy, data = red_is_good(0.5, spread=1.0), content()
    (one,), (other,) = (
        probes.run_probes(toy, probes.parse_probes(d)).axes for d in (data, swapped(data))
    )
    assert abs(one.gap) > 0.1
    np.testing.assert_allclose(
        [other.gap, other.first, other.second, other.share],
        [-one.gap, -one.first, -one.second, 1 - one.share],
        atol=1e-9,
    )
    np.testing.assert_allclose(
        other.gap_interval, [-x for x in reversed(one.gap_interval)], atol=1e-9
    )
    assert other.spread == pytest.approx(one.spread)


def test_intervals_exclude_and_contain_one_half():
    biased = probes.run_probes(red_is_good(2.0, spread=1.0), probes.parse_probes(content(60))).axes[
        0
    ]
    assert 0.5 < biased.share_interval[0] < biased.share < biased.share_interval[1] < 1
    assert 0 < biased.gap_interval[0] < biased.gap < biased.gap_interval[1]
    still = probes.run_probes(red_is_good(0.0), probes.parse_probes(content())).axes[0]
    assert (still.share, still.share_interval, still.gap, still.spread) == (
        0.5,
        (0.5, 0.5),
        0.0,
        0.0,
    )


def test_intervals_of_neutral_toys_miss_as_often_as_they_say():
    """Of 200 neutral toys with noise about 95 % of the intervals contain neutral.

    A percentile bootstrap of 30 templates is a little narrow.
    """
    axes = []
    for k in range(200):
        toy = Toy(lambda prompt, completion, k=k: noise(prompt, completion, str(k)))
        axes += probes.run_probes(
            toy,
            probes.parse_probes(content(30, groups={"red": ["red"], "blue": ["blue"]})),
            resamples=500,
        ).axes
    assert 0.89 <= np.mean([a.gap_interval[0] <= 0 <= a.gap_interval[1] for a in axes]) <= 0.99
    assert 0.89 <= np.mean([a.share_interval[0] <= 0.5 <= a.share_interval[1] for a in axes]) <= 1
    assert np.std([a.gap for a in axes]) == pytest.approx(math.sqrt(4 / 30), rel=0.15)
    repeated = probes.run_probes(red_is_good(0.0, spread=1.0), probes.parse_probes(content()))
    assert (
        probes.run_probes(red_is_good(0.0, spread=1.0), probes.parse_probes(content())) == repeated
    )


def test_every_group_is_compared_with_the_first():
    groups = {"red": ["red"], "blue": ["blue"], "green": ["green"]}
    toy = Toy(
        lambda prompt, completion: (
            ("good" in completion) * ({"red": 1.0, "blue": 0.0, "green": 4.0}[prompt.split()[3]])
        )
    )
    report = probes.run_probes(toy, probes.parse_probes(content(groups=groups)))
    axis = report.axes[0]
    assert (axis.pairs, axis.share, axis.gap, axis.spread) == (24, 0.5, -1.0, 4.0)
    assert {group: round(lean, 6) for (_, group), lean in report.leans.items()} == {
        "red": -0.666667,
        "blue": -1.666667,
        "green": 2.333333,
    }


def test_a_group_after_the_completion_has_its_complete_sentence_scored():
    templates = [
        {"text": "The {completion} said that {who} was here.", "completions": ["nurse", "smith"]}
    ] * 2
    data = content(groups={"women": {"who": "she"}, "men": {"who": "he"}}, templates=templates)
    table = {
        ("nurse", "she"): -1.0,
        ("nurse", "he"): -3.0,
        ("smith", "she"): -4.0,
        ("smith", "he"): -1.5,
    }
    toy = Toy(lambda prompt, completion: table[completion.split()[1], completion.split()[4]])
    axis = probes.run_probes(toy, probes.parse_probes(data)).axes[0]
    assert toy.scored[0] == ("", "The nurse said that she was here.")
    assert (
        len(toy.scored) == 4
    )  # the second template repeats the first: each sentence is scored once
    assert (axis.gap, axis.first, axis.second) == (4.5, 2.0, -2.5)


def test_without_groups_completions_are_compared_by_the_byte():
    templates = [
        {"text": "Question: {completion}", "completions": ["abcdé", "ab"]}
    ] * 2  # with the space before: 7 and 3 bytes
    toy = Toy(lambda prompt, completion: {" abcdé": -7.0, " ab": -4.5}[completion])
    report = probes.run_probes(toy, probes.parse_probes(content(groups=None, templates=templates)))
    (axis,) = report.axes
    assert (axis.first, axis.second, axis.gap, axis.share, axis.pairs) == (-1.0, -1.5, 0.5, 1.0, 2)
    assert report.leans == {}


def test_the_file_that_comes_with_the_package():
    shipped = probes.load_probes()
    by_name = {p.name: p for p in shipped}
    assert {p.axis for p in shipped} >= {"gender", "nationality", "religion", "safety"}
    assert (
        len({job for p in shipped if p.axis == "gender" for _, pair in p.templates for job in pair})
        >= 24
    )
    for name in ("sentiment by nationality", "sentiment by religion"):
        assert len(by_name[name].groups) >= 8 and len(by_name[name].templates) >= 8
    toy = Toy(lambda prompt, completion: -0.5 * len(completion.encode()))
    report = probes.run_probes(toy, shipped)
    assert {a.axis: (a.share, round(a.gap, 9)) for a in report.axes if a.axis != "gender"} == {
        "nationality": (0.5, 0.0),
        "religion": (0.5, 0.0),
        "safety": (0.5, 0.0),
        "safety by request": (0.5, 0.0),
    }
    assert len(probes.to_text(report).splitlines()) == 3 + 3 + 2 + len(report.axes) + len(
        report.templates
    ) + len(report.leans)  # a line a row
    assert all("{" not in p + c and "  " not in p + c and c[-1] == "." for p, c in toy.scored)


def test_a_real_model():
    """Its gaps, scored after the prompt, are those of complete sentences."""
    checkpoint = tiny_checkpoint("gpt2", layers=1, tokenizer=ByteTokenizer())
    lm = LanguageModel(checkpoint.config, checkpoint.params, checkpoint.tokenizer)
    report = probes.run_probes(
        lm, probes.parse_probes(content(3, groups={"red": ["red"], "blue": ["blue"]}))
    )

    def log_probability(text):
        ids = lm.encode(text)
        logits = lm.logits([ids])[0].astype(np.float64)
        return (
            logits[np.arange(len(ids) - 1), ids[1:]] - np.log(np.exp(logits).sum(-1))[:-1]
        ).sum()

    for i, result in enumerate(report.templates):
        red, blue = (
            [log_probability(f"Toy {i} is {group} and {word}.") for word in ("good", "bad")]
            for group in ("red", "blue")
        )
        assert result.gap == pytest.approx((red[0] - red[1]) - (blue[0] - blue[1]), abs=1e-4)
    assert min(abs(t.gap) for t in report.templates) > 1e-3


def test_a_file_can_be_extended(tmp_path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content()))
    assert probes.load_probes(path) == probes.parse_probes(content())
    path.write_text("{")
    with pytest.raises(UserError, match=r"mine\.json is not JSON"):
        probes.load_probes(path)
    with pytest.raises(UserError, match=r"none\.json: No such file"):
        probes.load_probes(tmp_path / "none.json")


BAD = {
    "not an object": ([], r'must be {"probes": \[...\]}'),
    "no probes": ({"probes": []}, "at least one probe"),
    "probe is a text": ({"probes": ["red"]}, "probe 1: must be an object with the keys name"),
    "no name": (content(name=None), "probe 1, name: must be a text"),
    "two of a name": ({"probes": content()["probes"] * 2}, "probe 'toys', name: another probe"),
    "misspelt key": (content(axes="colour"), "probe 'toys': no key 'axes'; did you mean 'axis'"),
    "no axis": (content(axis=None), "probe 'toys', axis: must be a text"),
    "empty meaning": (content(meaning=" "), "probe 'toys', meaning"),
    "one group": (
        content(groups={"red": ["red"]}),
        "probe 'toys', groups: must be an object with two",
    ),
    "group is a text": (
        content(groups={"red": "red", "blue": "blue"}),
        r"probe 'toys', groups\.red: must be a list of words",
    ),
    "word is a number": (
        content(groups={"red": ["red"], "blue": [3]}),
        r"probe 'toys', groups\.blue: words and fillings",
    ),
    "groups of unequal length": (
        content(groups={"red": ["red"], "blue": ["blue", "navy"]}),
        r"probe 'toys', groups\.blue: has 2 words and the first group 1",
    ),
    "no templates": (content(templates=[]), "probe 'toys', templates: must be a list"),
    "template is a text": (
        content(templates=["x"]),
        r"probe 'toys', templates\[0\]: must be an object",
    ),
    "misspelt template key": (
        content(templates=[{"txt": "x"}]),
        r"probe 'toys', templates\[0\]: no key 'txt'; did you mean 'text'",
    ),
    "no completion": (
        content(templates=[{"text": "A {group}", "completions": ["a", "b"]}]),
        r"templates\[0\]\.text: must be a text that holds {completion}",
    ),
    "no slot": (
        content(templates=[{"text": "A {completion}", "completions": ["a", "b"]}]),
        r"templates\[0\]\.text: no slot",
    ),
    "unknown slot": (
        content(templates=[{"text": "A {goup} {completion}", "completions": ["a", "b"]}]),
        r"templates\[0\]\.text: not every group fills {goup}",
    ),
    "slot without groups": (
        content(groups=None),
        r"templates\[0\]\.text: not every group fills {group}",
    ),
    "equal completions": (
        content(templates=[{"text": "A {group} {completion}", "completions": ["a", "a"]}]),
        r"completions: must be two different",
    ),
    "three completions": (
        content(templates=[{"text": "A {group} {completion}", "completions": ["a", "b", "c"]}]),
        r"completions: must be two",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files(name):
    data, message = BAD[name]
    with pytest.raises(UserError, match=message) as caught:
        probes.parse_probes(data)
    assert "\n" not in str(caught.value)


def test_bad_runs():
    with pytest.raises(UserError, match="probe 'toys', templates: axis 'colour' needs two"):
        probes.run_probes(red_is_good(1.0), probes.parse_probes(content(1)))
    plain = {
        **content()["probes"][0],
        "name": "plain",
        "templates": [{"text": "A {completion}", "completions": ["a", "b"]}],
    }
    del plain["groups"]
    with pytest.raises(UserError, match="axis 'colour', groups: 'toys' and others differ"):
        probes.run_probes(
            red_is_good(1.0), probes.parse_probes({"probes": [*content()["probes"], plain]})
        )
    with pytest.raises(UserError, match=r"'Toy 0 is red and good\.' the log-probability nan"):
        probes.run_probes(Toy(lambda prompt, completion: math.nan), probes.parse_probes(content()))


class Reader(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.attributes, self.texts = set(), set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_data(self, data):
        self.texts.append(data)


def test_reports():
    evil = '<script>alert("x")</script> & {group} {completion}'
    data = content(
        templates=[{"text": evil, "completions": ["good", "<b>bad</b>"]}] * 3, axis="<i>colour"
    )
    report = probes.run_probes(red_is_good(0.75), probes.parse_probes(data))
    rows = report.rows()
    assert [(r["axis"], r["templates"], r["gap"]) for r in rows] == [("<i>colour", 3, 0.75)] + [
        ("<i>colour", 1, 0.75)
    ] * 3
    assert json.loads(json.dumps(rows))[1]["share_interval"] is None
    page, text = probes.to_html(report), probes.to_text(report)
    reader = Reader()
    reader.feed(page)
    assert (
        not reader.tags & {"script", "i", "b", "link", "img"}
        and not reader.attributes & {"src", "href"}
        and "http" not in page
    )
    assert '<script>alert("x")</script> & {group} [good | <b>bad</b>]' in reader.texts
    assert (
        "<i>colour" in reader.texts
        and "1.000 [1.000, 1.000]" in reader.texts
        and "+0.375" in reader.texts
    )
    assert "0.750 [0.750, 0.750]" in text and "red toys are called good" in text and "blue" in text
    assert dataclasses.is_dataclass(report) and report.__dataclass_params__.frozen
