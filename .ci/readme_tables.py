# SPDX-License-Identifier: Apache-2.0
"""Write the README's generated tables, or with ``--check`` fail where they are stale.

The table of layouts comes from `portakv.presets`, the one of backends from
`conformance/support.toml`.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from portakv.presets import PRESETS

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


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
    pairs = tomllib.loads((ROOT / "conformance" / "support.toml").read_text())["pair"]
    columns = ("device", "verified", "versions", "date")
    rows = [f"| `{p['backend']}` | {' | '.join(p[c] for c in columns)} |" for p in pairs]
    head = "| backend | device | verified | versions | date |"
    return "\n".join([head, "|---|---|---|---|---|", *rows])


def fill(text: str) -> str:
    """The README with both tables written anew."""
    for name, table in (("layouts", layouts()), ("backends", backends())):
        mark = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text, found = re.subn(mark, rf"\g<1>{table}\n\2", text, flags=re.S)
        if found != 1:
            sys.exit(f"README.md must hold one `<!-- table: {name} -->` ... `<!-- end -->`.")
    return text


def main() -> None:
    """Write, or check."""
    old = README.read_text()
    new = fill(old)
    if "--check" not in sys.argv:
        README.write_text(new)
    elif new != old:
        sys.exit("README.md's tables are stale; run python .ci/readme_tables.py.")


if __name__ == "__main__":
    main()
