# SPDX-License-Identifier: Apache-2.0
"""Write docs/pitfalls.md from conformance/pitfalls.toml; ``--check`` fails where it is stale."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "conformance" / "pitfalls.toml"
PAGE = ROOT / "docs" / "pitfalls.md"

#: The introduction of each area, for a reader who writes a backend.
AREAS = {
    "addressing": "Where rows lie. Read addresses, strides and widths from the view and the plan, "
    "and derive nothing from shapes.",
    "indices": "Lists of ids as engines pass them. PortaKV converts lists that your launch does "
    "not claim to read.",
    "ordering": "Work that a copy must wait for, and work that must wait for the copy. These "
    "cases need a device; `--device simdev` shows a missing wait as wrong bytes every time.",
    "host memory": "Pinned and registered memory.",
    "copy engine": "Runs of bytes handed to a driver's copy.",
    "honesty": "Figures that mislead.",
}

_HEAD = """\
# Pitfalls

*Reference: faults of released code that copies KV rows, and the tests that reveal them.*

You write a backend, and want to know which mistakes others made. Each row of the tables is a
fault of released code or of its issue tracker. The second column names the cases of the suite
that fail if your backend has the fault. A dash means that only the library can have it, or that
no case can show it yet. The third column names PortaKV's own tests of the steps before and after
your launch.

To test your backend against one row:

```
portakv conform NAME --profile full --only test_safety::test_misaligned
```

"""
_COLUMNS = (
    "| what goes wrong | fails in your backend | fails in PortaKV's own tests |\n|---|---|---|"
)


def load() -> list[dict[str, Any]]:
    """Return the pitfalls in the order of the file."""
    pitfalls: list[dict[str, Any]] = tomllib.loads(SOURCE.read_text(encoding="utf-8"))["pitfall"]
    return pitfalls


def page() -> str:
    """Return the text of the page."""
    pitfalls = load()
    open_ones = sum("tests" not in pitfall for pitfall in pitfalls)
    parts = [
        _HEAD + f"Tests cover {len(pitfalls) - open_ones} of {len(pitfalls)} pitfalls. "
        f"`.ci/pitfalls_table.py` writes this page from `conformance/pitfalls.toml`."
    ]
    for area, about in AREAS.items():
        rows = [_row(pitfall) for pitfall in pitfalls if pitfall["area"] == area]
        parts.append(f"## {area.capitalize()}\n\n{about}\n\n" + "\n".join([_COLUMNS, *rows]))
    return "\n\n".join(parts) + "\n"


def _row(pitfall: dict[str, Any]) -> str:
    tests, later = pitfall.get("tests", ()), pitfall.get("later")
    suite = [_name(test) for test in tests if test.startswith("cases/")]
    own = [_name(test) for test in tests if not test.startswith("cases/")]
    if later:
        own.append(f"*{later}*")
    return f"| {pitfall['what']} | {'<br>'.join(suite) or '-'} | {'<br>'.join(own) or '-'} |"


def _name(test: str) -> str:
    """Return file and function of a test without the class between them."""
    file, *_, function = test.partition("/")[2].split("::")
    return f"`{file}::{function}`"


def main() -> None:
    """Write, or check."""
    new = page()
    if "--check" not in sys.argv:
        PAGE.write_text(new, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != new:
        sys.exit(
            "docs/pitfalls.md is not what conformance/pitfalls.toml says. Run "
            "`python .ci/pitfalls_table.py` and commit the page."
        )


if __name__ == "__main__":
    main()
