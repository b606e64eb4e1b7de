"""``python -m trajstore.cli``, for a checkout that is not installed."""

from __future__ import annotations

from trajstore.cli import main

main(prog_name="trajstore")
