# SPDX-License-Identifier: Apache-2.0
"""Write the README's generated tables, or with ``--check`` fail where they are stale.

The table of layouts comes from `portakv.presets`, that of backends from `conformance/ladder.toml`,
whose rows the files in `conformance/results` bear out. A rung whose backend has changed since stays
in the table as expired: writing the tables anew says so, reaching it again and `.ci/keep_result.py`
mend it.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from portakv_conformance import evidence, ladder
from portakv_conformance.report import support

from portakv.presets import PRESETS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
LADDER = ROOT / "conformance" / "ladder.toml"

FAMILIES = ("LMCache", "vLLM-Ascend", "vLLM-RBLN", "vLLM", "SGLang", "FlexKV", "Dynamo")


def layouts() -> str:
    """One row for each family of engines: its presets."""
    families: dict[str, list[str]] = {}
    for preset in PRESETS.values():
        family = next((f for f in FAMILIES if preset.engine.startswith(f)), preset.engine)
        families.setdefault(family, []).append(preset.name)
    rows = [f"| {f} | {', '.join(f'`{n}`' for n in names)} |" for f, names in families.items()]
    return "\n".join(["| engine | presets |", "|---|---|", *rows])


def backends() -> str:
    """One row for each backend-device pair, with how far it was verified."""
    try:
        rungs = ladder.read(LADDER)
    except ValueError as error:
        sys.exit(str(error))
    wrong = evidence.contradictions(rungs, ROOT)
    if wrong:
        sys.exit("\n".join(wrong))
    return support.table(rungs)


def fill(text: str) -> str:
    """The README with both tables written anew."""
    for name, table in (("layouts", layouts()), ("backends", backends())):
        mark = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(mark, rf"\g<1>{table}\n\2", text, flags=re.S)
        if found != 1:
            sys.exit(f"README.md must hold one `<!-- table: {name} -->` ... `<!-- end -->`.")
    return text


def write() -> None:
    """Write the tables into README.md."""
    README.write_text(fill(README.read_text()))


def check() -> None:
    """Fail where the README says something else, naming the lines that should stand there."""
    old = README.read_text()
    new = fill(old)
    if new == old:
        return
    due = [line for line in new.splitlines() if line not in old.splitlines()]
    sys.exit(
        "README.md's tables are stale: a preset, a result or a backend's source has changed. Run "
        "`python .ci/readme_tables.py` and commit README.md; to renew an expired result, run the "
        "suite and `python .ci/keep_result.py REPORT`. What should stand there:\n"
        + "\n".join(due or ["(only lines that are to go)"])
    )


def main() -> None:
    """Write, or check."""
    check() if "--check" in sys.argv else write()


if __name__ == "__main__":
    main()
