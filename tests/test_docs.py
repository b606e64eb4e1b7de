"""Documentation runs, or it lies.

Every ```` ```python ```` block of README.md and docs/*.md is executed: those of a page in order, in one namespace and
an empty folder. What a page needs and does not show stands in a comment, ``<!-- setup: ... -->``, and is executed in
its place. A page ends quietly where it imports an optional package that is not installed. A block marked
```` ```python no-run: reason ```` is not executed.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))) if page.is_file()]
OPTIONAL = {
    *(
        "ale_py",
        "awkward",
        "click",
        "dask",
        "distributed",
        "gymnasium",
        "h5py",
        "hdf5plugin",
        "lz4",
        "matplotlib",
        "pandas",
    ),
    *("pyarrow", "rich", "tensorstore", "torch", "xarray", "zarr", "zarrs"),
}

_CODE = re.compile(r"^```python *(?P<mark>[^\n]*)\n(?P<shown>.*?)^```|<!-- setup:\n(?P<hidden>.*?)-->", re.S | re.M)
_LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)\s]*)?\)")


def code_of(page: Path) -> list[Any]:
    """The blocks of a page, compiled, with the page's own line numbers."""
    text = page.read_text()
    blocks = []
    for found in _CODE.finditer(text):
        mark = found["mark"] or ""
        assert mark == "" or mark.startswith("no-run: "), f"{page.name}: ```python {mark}"
        if not mark:
            kind = "shown" if found["shown"] is not None else "hidden"
            lines = text.count("\n", 0, found.start(kind))
            blocks.append(compile("\n" * lines + found[kind], str(page), "exec"))
    return blocks


@pytest.mark.parametrize("page", [page for page in PAGES if code_of(page)], ids=lambda page: page.name)
def test_every_block_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in code_of(page):
        try:
            exec(block, namespace)
        except ImportError as error:
            missing = (error.name or "").partition(".")[0]
            if missing in OPTIONAL and importlib.util.find_spec(missing) is None:
                pytest.skip(f"from here on it needs {missing}")
            raise


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target, _ in _LINK.findall(re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_page_can_be_found_from_another() -> None:
    linked = {(page.parent / target).resolve() for page in PAGES for target, _ in _LINK.findall(page.read_text())}
    assert {page for page in PAGES if page.name != "README.md"} <= linked


def test_the_readme_has_what_it_must() -> None:
    text = (ROOT / "README.md").read_text()
    first_screen = "\n".join(text.splitlines()[:60])
    for words in ("trajstore demo", "pytest", "```python", "kill -9"):
        assert words in first_screen
    first = next(found["shown"] for found in _CODE.finditer(text) if found["shown"] is not None)
    assert len([line for line in first.splitlines() if line.strip()]) <= 14
