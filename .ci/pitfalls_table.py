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

#: What each area is about, for a reader who writes a backend.
AREAS = {
    "addressing": "Where rows lie. Read addresses, strides and widths from the view and the plan, "
    "and derive nothing from shapes.",
    "indices": "Lists of ids as engines pass them. What your launch does not claim to read is "
    "brought into a form that it does read.",
    "ordering": "What a copy waits for, and what waits for it. These cases need a device; "
    "`--device simdev` shows a missing wait as wrong bytes every time.",
    "host memory": "Pinned and registered memory.",
    "copy engine": "Runs of bytes handed to a driver's copy.",
    "honesty": "Figures that say something else than they seem to.",
}

_HEAD = """\
# Pitfalls

Each line is a fault that was found in a released mover of KV rows, or in its issue tracker. Beside
it stand the cases of the suite that fail if your backend has it, and PortaKV's own tests, which
hold what the library does before and after your launch. A dash among the cases: that part is the
library's alone, or no case can show it yet.

To try your backend on one line of the table:

```
portakv conform NAME --profile full --only test_safety::test_misaligned
```

"""
_COLUMNS = (
    "| what goes wrong | fails in your backend | fails in PortaKV's own tests |\n|---|---|---|"
)


def load() -> list[dict[str, Any]]:
    """The pitfalls in their order."""
    found: list[dict[str, Any]] = tomllib.loads(SOURCE.read_text(encoding="utf-8"))["pitfall"]
    return found


def page() -> str:
    """The page of the documentation."""
    pitfalls = load()
    open_ones = sum("tests" not in pitfall for pitfall in pitfalls)
    parts = [
        _HEAD + f"{len(pitfalls)} pitfalls, of which {len(pitfalls) - open_ones} are tested; of "
        f"parts that are not built yet there are {open_ones}. The page is\n"
        f"written from `conformance/pitfalls.toml`."
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
    """File and function; the class between them says nothing to a reader."""
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
