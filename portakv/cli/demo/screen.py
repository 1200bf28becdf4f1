# SPDX-License-Identifier: Apache-2.0
"""What the demo prints: three parts, each with what was done and what it proves, in 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import torch

from portakv import __version__
from portakv.cli.candidates import Candidate, print_candidates
from portakv.cli.console import Column, print_table
from portakv.cli.demo.model import ModelPart
from portakv.cli.demo.moves import ROUNDS, Row
from portakv.cli.demo.scenario import Scenario
from portakv.registry.registry import ENVIRONMENT
from portakv.runtime.devices import device_name

WIDTH = 80

_COLUMNS = (
    Column("backend", whole=True),
    Column("call", whole=True),
    Column("what moves", whole=True),
    Column("time", whole=True, right=True),
    Column("vs copy_", whole=True, right=True),
    Column("bytes", whole=True),
)


def tell(text: str) -> None:
    """Print at once, into a pipe too: the demo takes seconds, and each part is worth seeing."""
    print(text, flush=True)


def tell_heading(device: torch.device, forced: str | None) -> None:
    """Versions, the device and what the environment forces; then the first part's title."""
    parts = [str(device), device_name(device)]
    if device.type == "cpu":
        threads = torch.get_num_threads()
        parts.append(f"{threads} thread" + "s" * (threads > 1))
    where = ", ".join(part for part in parts if part)
    tell(f"PortaKV {__version__}, torch {torch.__version__}, on {where}")
    if forced:
        tell(f"{ENVIRONMENT}={forced} is set: that backend runs alone.")
    tell("\n1. A model's KV cache leaves its pages and comes back in others\n")
    tell(_prose("The model is a small Llama with random weights; nothing is downloaded."))
    tell("")


def tell_line(line: str) -> None:
    """One line of the model's story."""
    tell(f"  {line}")


def tell_scenario(scenario: Scenario, device: torch.device, serving: Sequence[str]) -> None:
    """The second part's title, and what is moved."""
    s = scenario
    tell(f"\n2. {_size(s.payload)} of KV cache through {', '.join(serving)}\n")
    text = (
        f"{s.tokens} tokens of {s.layers} layers, keys and values, {s.heads} heads of {s.dim} "
        f"fp16 numbers, between paged caches of {s.blocks} blocks of {s.block_size} tokens "
        f"({_size(s.pool)}) and a dense chunk."
    )
    if s.full_layers:
        text += (
            f" Scaled down: {s.full_layers} layers would take more than half of the free memory "
            f"of {device}."
        )
    tell(_prose(text))


def tell_rows(rows: Sequence[Row], threads: int | None) -> None:
    """The table, and what it says."""
    tell("")
    print_table(_COLUMNS, [_cells(row) for row in rows])
    tell("")
    for row in rows:
        why = f"refused: {row.refused}" if row.refused else f"failed: {row.failed}"
        if row.refused or row.failed:
            tell(_prose(f"{row.backend}, {row.call}, {row.way}, {why}"))
    tell(_prose(_proven(rows)))
    tell("")
    text = (
        "vs copy_: the time of torch's copy_ of the same bytes from one dense chunk to another "
        f"/ this time; 1.00x is as fast. Medians of {ROUNDS} rounds in which all took turns."
    )
    if threads is not None and threads < torch.get_num_threads():
        text += (
            f" All with {threads} of {torch.get_num_threads()} threads, with which they are the "
            f"fastest now: the cores have other work, too."
        )
    tell(_prose(text))


def _proven(rows: Sequence[Row]) -> str:
    right = sum(row.checked for row in rows if row.right)
    wrong = sum(row.wrong for row in rows)
    said = (
        f"bytes: {_size(right)} were compared with what plain torch indexing gives, the pages "
        f"that a copy must not touch included, and are right."
    )
    return f"{said} {wrong:,} bytes of other copies are WRONG." if wrong else said


def tell_choice(
    candidates: Sequence[Candidate], device: torch.device, forced: str | None, run: Sequence[str]
) -> None:
    """The third part: what the registry chooses, and every candidate's answer."""
    tell(f"\n3. What the registry chooses for {device}\n")
    print_candidates(candidates, "")
    chosen = next((c.name for c in candidates if c.chosen), "nothing")
    why = f"{ENVIRONMENT} forces it" if forced else "the first that is accepted, in this order"
    text = f"{chosen} is chosen: {why}."
    for name in (c.name for c in candidates if c.accepted and c.name not in run and not forced):
        text += f" {name} is used only if it is asked for, so the demo did not run it."
    tell("\n" + _prose(text))


def tell_verdict(model: ModelPart, rows: Sequence[Row], seconds: float) -> None:
    """The last lines."""
    failed = dict.fromkeys(row.backend for row in rows if not row.good)
    proven = dict.fromkeys(row.backend for row in rows if row.right and row.backend not in failed)
    right, wrong = ", ".join(proven), ", ".join(failed)
    logits = "bit-identical" if model.good else "NOT bit-identical, or the control did not differ"
    tell("")
    tell(f"logits    {'not tried, see above' if model.skipped else logits}")
    tell(f"bytes     all right through {right}" if right else "bytes     right through no backend")
    if wrong:
        tell(f"          WRONG or missing through {wrong}")
    tell(f"time      {seconds:.0f} s")


def _cells(row: Row) -> list[str]:
    time = "" if row.seconds is None else _time(row.seconds)
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}x"
    return [row.backend, row.call, row.way, time, ratio, _bytes(row)]


def _bytes(row: Row) -> str:
    if row.refused:
        return "refused"
    if row.failed:
        return "failed"
    if row.wrong:
        return f"{row.wrong:,} wrong"
    return "all right" if row.checked else ""


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def _size(count: int) -> str:
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << shift:
            return f"{count / (1 << shift):.3g} {unit}"
    return f"{count} B"


def _prose(text: str) -> str:
    return textwrap.fill(text, WIDTH)
