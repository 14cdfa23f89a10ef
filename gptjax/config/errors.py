"""The error that a user sees for wrong input, and the words for a misspelt name."""

from __future__ import annotations

import difflib


class UserError(ValueError):
    """The user's input is wrong: the commands print the message alone and exit with code 2.

    >>> lm.generate("The quick", temperatur=0.5)
    Traceback (most recent call last):
        ...
    gptjax.config.errors.UserError: no setting 'temperatur'; did you mean 'temperature'?
    """


def nearest(name: str, names: list[str]) -> str:
    """The name that a misspelt one may have meant, or ""."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if not close:  # a setting in the wrong section: look for the same leaf elsewhere
        close = [n for n in names if n.split(".")[-1] == name.split(".")[-1]]
    return close[0] if close else ""


def unknown_name(what: str, name: str, names: list[str]) -> str:
    """One sentence for a misspelt name, used wherever a table is looked up."""
    near = nearest(name, names)
    hint = f"did you mean {near!r}?" if near else f"there are: {', '.join(names)}"
    return f"no {what} {name!r}; {hint}"
