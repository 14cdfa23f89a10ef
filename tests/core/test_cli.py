"""Flags of the commands."""

import pytest

from gptjax.config.errors import UserError
from gptjax.core import cli


def test_a_setting_given_as_a_flag_is_told_how_it_is_written():
    with pytest.raises(UserError, match=r"changed by --config\.task\.name=VALUE"):
        cli.parse(["--task.name=chat"], "", {}, config=True)
    with pytest.raises(UserError, match=r"no flag '--task\.name'; did you mean"):
        cli.parse(["--task.name=chat"], "", {"name": ""})  # a command without a config
