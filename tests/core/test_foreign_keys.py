"""Keys of foreign files: used, without effect, or refused by name."""

import logging

import pytest

from gptjax.config.errors import UserError
from gptjax.core.foreign_keys import KeyTable, Refusal

TABLE = KeyTable(
    "toy.json",
    used=frozenset({"width"}),
    no_effect={"*_dropout": "dropout is off at inference", "attn_cache": "a matter of speed"},
    refused={"attn_*": Refusal("only plain attention is", unless=(False, 1))},
)


@pytest.mark.parametrize(
    "values",
    [
        {"width": 3},
        {"attn_cache": True},  # an exact name goes before a pattern
        {"attn_sinks": False},
        {"attn_sinks": None},
        {"attn_groups": 1},
        {"whatever": None},
        {"hidden_dropout": 0.5},
    ],
)
def test_what_changes_nothing_passes(values):
    TABLE.check(values, "toy.json")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"attn_sinks": True}, "toy.json: attn_sinks = true is not supported: only plain"),
        ({"attn_sinks": 0}, "attn_sinks = 0 is not supported"),  # 0 is not False
        ({"attn_groups": True}, "attn_groups = true is not supported"),  # True is not 1
        ({"widht": 3}, "the key 'widht' .= 3. is not known here"),
    ],
)
def test_the_rest_is_refused_by_name(values, message):
    with pytest.raises(UserError, match=message):
        TABLE.check(values, "toy.json")


def test_what_has_no_effect_is_listed_at_debug(caplog):
    with caplog.at_level(logging.DEBUG, logger="gptjax"):
        TABLE.check({"hidden_dropout": 0.5}, "toy.json")
    assert "hidden_dropout has no effect: dropout is off at inference" in caplog.text
