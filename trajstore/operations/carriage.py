"""What a format takes along of each kind of thing that a store may hold: said once, beside its exporter.

The contract test (``tests/test_contract.py``) holds every format to it, and the table of docs/interchange.md is made
of it.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Comes back equal, dtype and bytes.
KEPT = "yes"
#: Is not in the file; a field or column is named in the report's warnings.
LEFT = "no"


@dataclass(frozen=True)
class Carriage:
    """``KEPT``, ``LEFT``, or in a few words how what comes back differs, for each kind; what is not named is left.

    Fields are meant that have no role in the format: what it makes of observations and actions is in its own words.

    numbers : fields of bool, of every integer, and of float16 to float64, with a row for each step.
    complex_numbers, bfloat16, strings, documents : fields of these (documents: JSON).
    nested : fields inside others. extra_row, epochs, rate, ragged : fields of T + 1 and of T + E rows, of k rows a
    step, and of any number. absent : fields that some trajectories do not have. columns : of the table.
    configuration : of the store.
    """

    numbers: str = LEFT
    complex_numbers: str = LEFT
    bfloat16: str = LEFT
    strings: str = LEFT
    documents: str = LEFT
    nested: str = LEFT
    extra_row: str = LEFT
    epochs: str = LEFT
    rate: str = LEFT
    ragged: str = LEFT
    absent: str = LEFT
    columns: str = LEFT
    configuration: str = LEFT


TITLES = {
    "numbers": "numbers",
    "complex_numbers": "complex",
    "bfloat16": "bfloat16",
    "strings": "strings",
    "documents": "JSON",
    "nested": "nested",
    "extra_row": "T + 1 rows",
    "epochs": "T + E rows",
    "rate": "k rows a step",
    "ragged": "any rows",
    "absent": "absent in some",
    "columns": "columns",
    "configuration": "configuration",
}
EVERYTHING = Carriage(**dict.fromkeys(TITLES, KEPT))
