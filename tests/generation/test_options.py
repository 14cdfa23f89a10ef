"""`GenerationOptions`: one list of options for Python, type checkers and the command line."""

import dataclasses

import pytest

from gptjax.config.errors import UserError
from gptjax.core import cli
from gptjax.generation import requests, sampling
from gptjax.generation.flags import FLAGS, read_options
from gptjax.generation.options import CALLED, BatchKeywords, GenerationOptions, merge_options
from gptjax.generation.sampling import PROCESSORS, WARPERS, Sampling


def test_keywords_for_type_checkers_are_the_fields():
    fields = {field.name for field in dataclasses.fields(GenerationOptions)}
    assert set(BatchKeywords.__annotations__) == fields
    assert set(sampling.SamplingKeywords.__annotations__) == {
        field.name for field in dataclasses.fields(Sampling)
    }
    for field in dataclasses.fields(GenerationOptions):
        assert field.metadata["meaning"]


def test_every_number_is_a_flag_with_the_default_of_the_options():
    read = read_options(cli.Args({"temperature": "0"}))
    defaults = GenerationOptions(max_new_tokens=read.max_new_tokens, banned=[])
    assert read == defaults
    for name in sampling.NUMBERS:
        assert name in FLAGS
        flagged = read_options(cli.Args({name: "1"}))
        assert getattr(flagged, name) == 1


def test_no_beams_is_one_beam():
    assert read_options(cli.Args({"num_beams": "0"})) == read_options(cli.Args({}))


def test_keywords_win_over_options_and_old_names_work():
    options = GenerationOptions(temperature=0.5, n=3)
    merged = merge_options(options, {"n": 2, "speculate_tokens": 4})
    assert (merged.temperature, merged.n, merged.num_speculative_tokens) == (0.5, 2, 4)
    assert merge_options(None, {}) == GenerationOptions()
    with pytest.raises(UserError, match="did you mean 'max_new_tokens'"):
        merge_options(None, {"max_new_token": 3})


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("max_tokens", "max_tokens is called max_new_tokens here"),
        ("stop_sequences", "is called stop here"),
        ("num_return_sequences", "is called n here"),
        ("no_repeat_ngram_size", "is called no_repeat_ngram here"),
        ("top_n", "is called top_k here"),
        ("max_length", "max_length counts the prompt too: set max_new_tokens"),
        ("do_sample", "temperature = 0 is greedy"),
    ],
)
def test_names_of_other_libraries_are_told_their_name_here(name, words):
    with pytest.raises(UserError, match=words):
        merge_options(None, {name: 3})


def test_names_of_other_libraries_are_options_here():
    fields = {field.name for field in dataclasses.fields(GenerationOptions)}
    assert set(CALLED.values()) <= fields and not set(CALLED) & fields


def test_flags_of_other_programs_are_told_their_name_here():
    with pytest.raises(UserError, match="--max_tokens is called --max_new_tokens here"):
        cli.parse(["--max_tokens=3"], "", FLAGS, called=CALLED)
    with pytest.raises(UserError, match="no flag '--eos_token_id'"):  # no flag of that meaning
        cli.parse(["--eos_token_id=3"], "", FLAGS, called=CALLED)


def test_values_of_options_are_taken_or_refused_by_name():
    assert GenerationOptions(stop=None).stop_texts == []
    assert GenerationOptions(logit_bias={"9": 5}).logit_bias == {9: 5.0}  # JSON's keys
    for wrong in ({9: float("nan")}, {"king": 1.0}, {9: "much"}):
        with pytest.raises(UserError, match=r"logit_bias = .*: must be numbers by token id"):
            GenerationOptions(logit_bias=wrong)
    with pytest.raises(UserError, match=r"max_new_tokens = 2\.5: must be a whole number, at"):
        GenerationOptions(max_new_tokens=2.5)
    with pytest.raises(UserError, match="prompt 1 is None: give a text"):
        requests.list_prompts(["a", None])
    with pytest.raises(UserError, match="no prompts"):
        requests.list_prompts(None)


def test_unused_processors_are_not_active():
    assert Sampling().active == frozenset()
    everything = Sampling(
        temperature=0.5,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.5,
        repetition_penalty=1.2,
        frequency_penalty=0.1,
        no_repeat_ngram=3,
        min_new_tokens=2,
        logit_bias={1: 2.0},
        banned=[[3]],
    )
    names = {name.partition(":")[0] for name in everything.active}
    assert names == {*PROCESSORS, *WARPERS, "sample"} - {"guide"}  # made of a grammar, not here
    assert "ngram:3" in everything.active
