"""Options that several commands share; the users' names with underscores stand beside those with dashes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def usage(message: str) -> click.UsageError:
    """Wrong usage of the command that runs."""
    return click.UsageError(message, click.get_current_context(silent=True))


def option(*names: str, **settings: Any) -> Callable[[F], F]:
    """``click.option`` under its names with dashes, and hidden under those with underscores."""
    long = [name for name in names if name.startswith("--")]
    both = [*names, *(name[:2] + name[2:].replace("-", "_") for name in long if "-" in name[2:])]
    return click.option(*dict.fromkeys(both), **settings)


def store_argument(function: F) -> F:
    """STORE, or ``--ckpt-dir STORE``; given to the command as ``store``."""
    function = option("--ckpt-dir", "ckpt_dir", metavar="STORE", type=click.Path(), help="The store, as an option.")(
        function
    )
    return click.argument("store", required=False, type=click.Path())(function)


def one_of(name: str, argument: str | None, flag: str, given: str | None) -> str:
    """The argument or the option that stands for it; a usage error for none, or both."""
    if (argument is None) == (given is None):
        what = "given twice" if given is not None else "missing"
        raise usage(f"{name} is {what}: give it as an argument or as {flag}")
    return str(argument if argument is not None else given)


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, keys named as the Python attributes.")
progress_option = option("--no-progress", "no_progress", is_flag=True, help="Draw no progress bar.")
