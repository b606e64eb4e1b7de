"""``trajstore add-column``."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from trajstore.cli.options import json_option, option, usage
from trajstore.cli.output import print_json


@click.command(name="add-column")
@click.argument("store")
@click.argument("name")
@option(
    "--value", "expression", metavar="EXPRESSION", help="A column of this, e.g. 'length < 100' or 'score / length'."
)
@option("--sum", "summed", metavar="FIELD", help="A column of the sum of a field's rows, such as the return.")
@option("--returns-to-go", "returns", metavar="FIELD", help="A field: the discounted rewards from each step on.")
@option("--advantages", nargs=2, metavar="REWARD VALUE", help="A field: generalised advantage estimates.")
@option("--terminated", metavar="FIELD", help="Of --advantages: after such a step nothing comes.")
@option("--discount", type=float, help="Of --returns-to-go (1.0) and --advantages (0.99).")
@option("--decay", type=float, help="Lambda, of --advantages (0.95).")
@option("--dtype", metavar="DTYPE", help="Of a column; by default that of the values.")
@option("--default", "default", metavar="VALUE", help="For trajectories appended later without a value.")
@json_option
def add_column(
    store: str,
    name: str,
    expression: str | None,
    summed: str | None,
    returns: str | None,
    advantages: tuple[str, str] | None,
    terminated: str | None,
    discount: float | None,
    decay: float | None,
    dtype: str | None,
    default: str | None,
    as_json: bool,
) -> None:
    """Add a column, or a derived field, to a store.

    Nothing that is there is rewritten.

    \b
    Example:
      trajstore add-column run.zarr short --value "length < 100"
      trajstore add-column run.zarr return --sum reward
      trajstore add-column run.zarr returns_to_go --returns-to-go reward --discount 0.99
    """
    from trajstore.operations.derive import Advantages, ReturnsToGo, add_field
    from trajstore.operations.derive import add_column as add

    if sum(given is not None for given in (expression, summed, returns, advantages)) != 1:
        raise usage("say what it holds by one of --value, --sum, --returns-to-go and --advantages")
    is_column = expression is not None or summed is not None
    for flag, option_given, fits, what in (
        ("--terminated", terminated, advantages is not None, "--advantages"),
        ("--decay", decay, advantages is not None, "--advantages"),
        ("--discount", discount, not is_column, "--returns-to-go and --advantages"),
        ("--dtype", dtype, is_column, "--value and --sum"),
        ("--default", default, is_column, "--value and --sum"),
    ):
        if option_given is not None and not fits:
            raise usage(f"{flag} is for {what}")
    if is_column:
        values: Any = expression if expression is not None else _sum_of(store, str(summed))
        add(store, name, values, dtype=dtype, default=_number(default))
        kind = "column"
    elif returns is not None:
        add_field(store, name, ReturnsToGo(returns, 1.0 if discount is None else discount), like=returns)
        kind = "field"
    else:
        reward, value = advantages or ("", "")
        options: dict[str, Any] = {"terminated": terminated, "discount": discount, "decay": decay}
        rule = Advantages(reward, value, **{key: given for key, given in options.items() if given is not None})
        add_field(store, name, rule, like=reward)
        kind = "field"
    print_json({"store": store, kind: name}) if as_json else click.echo(f"added the {kind} {name} to {store}")


def _sum_of(store: str, field: str) -> Any:
    from trajstore.dataset import open as open_dataset
    from trajstore.operations.derive import numeric

    numeric(open_dataset(store), field)

    def summed(trajectory: Any) -> float:
        rows = trajectory[field]
        return math.nan if rows is None else float(rows[:].sum())

    return summed


def _number(text: str | None) -> Any:
    if text is None:
        return None
    try:
        value = json.loads(text) if text.lower() != "nan" else float("nan")
    except ValueError:
        value = None
    if not isinstance(value, (bool, int, float)):
        raise usage(f"--default takes a number, true, false or nan, not {text!r}")
    return value
