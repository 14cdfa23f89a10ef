"""Defaults of every setting; each other config starts from here.

A misspelt name is not an error at the line that writes it: all faults of a config are reported
together when the run starts, each with the nearest name.
"""

from gptjax.config import build, schema


def get_config():
    return build.to_config_dict(schema.Config(), locked=False)
