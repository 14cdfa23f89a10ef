"""Defaults of every knob; each other config starts from here.

A misspelt name is not an error at the line that writes it: all faults of a config are reported together
when the run starts, each with the nearest name.
"""

from gptjax import config, settings


def get_config():
    return settings.to_config_dict(config.Config(), locked=False)
