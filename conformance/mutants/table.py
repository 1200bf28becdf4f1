# SPDX-License-Identifier: Apache-2.0
"""The score as a table: on the terminal, and as the page of the documentation."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Mapping, Sequence
from itertools import groupby

from portakv_conformance.mutants.trial import Trial

_HEAD = """\
# Mutants

A suite that cannot fail proves nothing. So it comes with backends that have a bug: each is a small
correct kernel (`conformance/mutants/base.py`, on the simulated device `device_rows.py` beside
it) with one step of it replaced. The kernel itself passes the suite, in the profile `full`; every
mutant has to fail it, and one that survives is a bug of the suite.

This page is written by the score:

```
portakv conform --mutants                  # every mutant once; exit code 1 if one survives
portakv conform --mutants --runs 10        # under ten seeds
python -m portakv_conformance.mutants.score --write docs/mutants.md
portakv conform portakv_conformance.mutants.addressing:OffByOneSlot      # one of them by hand
```

Each mutant is judged by its profile on its device up to the first case that fails, with the
registry's power-on self-check out of the way; where that check alone turns a mutant down when it is
chosen, the table says so. A file of cases that names a mutant's weakness may come after a case that
meets it by chance; the table shows what came first. Seconds are those of the first run, on two
cores, two mutants at a time, loading torch and the suite included.
"""


def by_mutant(trials: Sequence[Trial]) -> list[list[Trial]]:
    """The trials of each mutant, in the order of the mutants."""
    return [list(group) for _, group in groupby(trials, key=lambda trial: trial.mutant.name)]


def document(trials: Sequence[Trial], self_checked: Collection[str]) -> str:
    """The page of the documentation.

    ``self_checked``: names of mutants that the registry's self-check turns down.
    """
    groups = by_mutant(trials)
    parts = [_HEAD, _sum(groups)]
    for module, mutants in groupby(groups, key=lambda g: g[0].mutant.target.partition(":")[0]):
        title = (importlib.import_module(module).__doc__ or "").partition("\n")[0]
        parts.append(f"\n## {title.rstrip('.')}\n")
        parts.append("| mutant | bug | profile | caught by | s |\n|---|---|---|---|---:|")
        parts += [_row(group, self_checked) for group in mutants]
    return "\n".join(parts) + "\n"


def _sum(groups: Sequence[Sequence[Trial]]) -> str:
    runs = len(groups[0]) if groups else 0
    caught = sum(all(trial.caught for trial in group) for group in groups)
    how = "" if runs == 1 else f" in {runs} runs of {runs}, each with another seed"
    unjudged = sum(not any(trial.judged for trial in group) for group in groups)
    rest = f" {unjudged} could not be judged here." if unjudged else ""
    return f"**{caught} of {len(groups)} mutants are caught{how}.{rest}**"


def _row(group: Sequence[Trial], self_checked: Collection[str]) -> str:
    first = group[0]
    mutant = first.mutant
    where = mutant.profile if mutant.device == "cpu" else f"{mutant.profile}, {mutant.device}"
    # A bar would end the cell, in code as well.
    found = first.caught_by.removeprefix("cases/").replace("|", "\\|")
    case = f"`{found}`" if first.caught else "**survives**" if first.judged else "not judged"
    if len(group) > 1:
        case += f" ({sum(trial.caught for trial in group)} of {len(group)})"
    if mutant.name in self_checked:
        case += "; the self-check too"
    return f"| `{mutant.name}` | {mutant.bug} | {where} | {case} | {first.seconds:.0f} |"


def print_score(
    trials: Sequence[Trial], self_checked: Collection[str], controls: Mapping[str, str | None]
) -> None:
    """Print the table, the survivors and the sum on standard output."""
    groups = by_mutant(trials)
    lines = [_cells(group, self_checked) for group in groups]
    _print_table(("mutant", "bug", "caught by", "runs", "s"), lines)
    for name, why in controls.items():
        print(f"{name}, un-mutated: {'passes' if why is None else f'FAILS: {why}'}")
    for group in groups:
        for trial in group:
            if not trial.caught:
                name = f"{trial.mutant.name} ({trial.mutant.target})"
                what = "SURVIVES" if trial.judged else "NOT JUDGED"
                print(f"{what} under seed {trial.seed}: {name}: {trial.reason}")
    print(_sum(groups).strip("*"))


def _cells(group: Sequence[Trial], self_checked: Collection[str]) -> tuple[str, ...]:
    first, caught = group[0], sum(trial.caught for trial in group)
    lost = "SURVIVES" if any(trial.survives for trial in group) else "not judged"
    case = next((trial.caught_by for trial in group if trial.caught), lost)
    note = " (self-check too)" if first.mutant.name in self_checked else ""
    runs, seconds = f"{caught}/{len(group)}", f"{first.seconds:.1f}"
    return first.mutant.name, first.mutant.bug, case.removeprefix("cases/") + note, runs, seconds


def _print_table(head: tuple[str, ...], lines: Sequence[tuple[str, ...]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for line in (head, *lines):
            print("  ".join(line))
        return
    table = Table(*head)
    for line in lines:
        style = "bold red" if line[2].startswith("SURVIVES") else ""
        table.add_row(*(Text(cell, style=style) for cell in line))
    Console(width=None if sys.stdout.isatty() else 160).print(table)
