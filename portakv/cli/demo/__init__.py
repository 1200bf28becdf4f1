# SPDX-License-Identifier: Apache-2.0
"""`portakv demo`: a model's KV cache out and back, then the backends checked and timed.

The demo stands above the whole library: it calls what a user calls, and the bytes that it expects
come from plain torch indexing alone. It prints three parts in 80 columns, each with what was done
and what that proves.
"""

from __future__ import annotations

import importlib
import io
import os
import textwrap
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from typing import Any

import torch

from portakv import __version__
from portakv.cli.backends import Candidate, candidates_for, print_candidates
from portakv.cli.console import Column, installing, print_json, print_table
from portakv.cli.demo import moves
from portakv.cli.demo.moves import FOUNDING, Founding, Row, Scenario
from portakv.cli.sides import in_bytes, in_time
from portakv.errors import PortaKVError
from portakv.registry.registry import ENVIRONMENT, REGISTRY, choose
from portakv.runtime.devices import device_name, usual_device

EXAMPLE = "portakv_examples.offload_transformers"


def run_demo(*, device: str | None = None, json: bool = False) -> int:
    """Run the demo on a device, by default the accelerator, else the CPU; with ``json`` nothing
    but one JSON object is printed.

    Returns:
        The exit code: 0 if logits were bit-identical and every byte was right, else 1.

    Raises:
        BackendUnavailable: no backend serves the device, or not the forced one; before any work.
        Unsupported: the backend that ``PORTAKV_BACKEND`` forces does not take one of the copies.
    """
    with redirect_stdout(io.StringIO()) if json else nullcontext():
        found = _demo(device)
    if json:
        print_json(found)
    return 0 if found["ok"] else 1


def _demo(device: str | None) -> dict[str, Any]:
    """Everything that is told, as JSON has it."""
    choice = choose(usual_device() if device is None else device)
    where = choice.backend.device
    forced = os.environ.get(ENVIRONMENT) or None
    began = time.perf_counter()
    _tell_heading(where, forced)
    model = run_model(where)
    scenario = moves.fitted(FOUNDING, moves.free_memory(where))
    # The backends that the registry may choose here; the forced one alone if there is one.
    names = [choice.name] if forced else REGISTRY.automatic(where)
    serving = [n for n in names if REGISTRY.ask(n, where, check=True)[0] is not None]
    _tell_scenario(scenario, where, serving)
    rows, threads = moves.measured(Founding(where, scenario), serving, forced is not None)
    _tell_rows(rows, threads)
    candidates = candidates_for(where)
    _tell_choice(candidates, where, forced, serving)
    identical = bool(model["skipped"]) or (model["identical"] and model["control_differs"])
    _tell_result(model["skipped"], identical, rows, time.perf_counter() - began)
    return {
        "portakv": __version__,
        "torch": str(torch.__version__),
        "device": str(where),
        "device_name": device_name(where),
        "forced": forced,
        "model": model,
        "scenario": {
            **asdict(scenario),
            "full_layers": scenario.full_layers or scenario.layers,
            "dtype": "float16",
            "payload_bytes": scenario.payload,
        },
        "threads": threads,
        "moves": [*map(asdict, rows)],
        "chosen": choice.name,
        "candidates": candidates,
        "ok": identical and all(row.good for row in rows),
    }


def run_model(device: torch.device) -> dict[str, Any]:
    """Run the example on ``device`` and print its lines as they come; what came of it by name,
    ``skipped``: why it did not run, and ``story``: its lines. A `transformers` that is missing,
    cannot be imported or is not served is told, not raised."""
    try:
        example = importlib.import_module(EXAMPLE)
    except (ImportError, PortaKVError) as error:  # a release that the plug does not serve, too
        if (getattr(error, "name", "") or "").startswith("portakv"):
            raise
        why = f"it needs transformers ({error}); {installing('demo')} adds it"
        _tell(f"  skipped  {why}")
        return {"skipped": why, "story": []}
    story: list[str] = []

    def hear(line: str) -> None:
        story.append(line)
        _tell(f"  {line}")

    return {"skipped": None, **vars(example.main(device, hear)), "story": story}


def _tell(text: str) -> None:
    # At once, into a pipe too: the demo takes seconds, and each part is worth seeing.
    print(text, flush=True)


def _folded(text: str) -> str:
    return textwrap.fill(text, 80)


def _tell_heading(device: torch.device, forced: str | None) -> None:
    threads = torch.get_num_threads()
    cores = f"{threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else ""
    where = ", ".join(part for part in (str(device), device_name(device), cores) if part)
    _tell(f"PortaKV {__version__}, torch {torch.__version__}, on {where}")
    if forced:
        _tell(f"{ENVIRONMENT}={forced} is set: that backend runs alone.")
    _tell("\n1. A model's KV cache leaves its pages and comes back in others\n")
    _tell("The model is a small Llama with random weights; nothing is downloaded.\n")


def _tell_scenario(s: Scenario, device: torch.device, serving: Sequence[str]) -> None:
    _tell(f"\n2. {in_bytes(s.payload)} of KV cache through {', '.join(serving)}\n")
    text = (
        f"{s.tokens} tokens of {s.layers} layers, keys and values, {s.heads} heads of {s.dim} "
        f"fp16 numbers, between paged caches of {s.blocks} blocks of {s.block_size} tokens "
        f"({in_bytes(s.pool)}) and a dense chunk."
    )
    if s.full_layers:
        text += (
            f" Scaled down: {s.full_layers} layers would take more than half of the free memory "
            f"of {device}."
        )
    _tell(_folded(text))


def _tell_rows(rows: Sequence[Row], threads: int | None) -> None:
    numbers = ("time", "vs copy_")
    names = ("backend", "call", "what moves", *numbers, "bytes")
    columns = [Column(name, whole=True, right=name in numbers) for name in names]
    _tell("")
    print_table(columns, [_cells(row) for row in rows])
    _tell("")
    for row in rows:
        if why := row.refused or row.failed:
            how = "refused" if row.refused else "failed"
            _tell(_folded(f"{row.backend}, {row.call}, {row.way}, {how}: {why}"))
    text = (
        f"bytes: {in_bytes(sum(row.checked for row in rows if row.right))} were compared with what "
        f"plain torch indexing gives, the pages that a copy must not touch included, and are right."
    )
    if wrong := sum(row.wrong for row in rows):
        text += f" {wrong:,} bytes of other copies are WRONG."
    _tell(_folded(text))
    text = (
        "vs copy_: the time of torch's copy_ of the same bytes from one dense chunk to another "
        f"/ this time; 1.00x is as fast. Medians of {moves.ROUNDS} rounds in which all took turns."
    )
    if threads is not None and threads < torch.get_num_threads():
        text += (
            f" All with {threads} of {torch.get_num_threads()} threads, with which they are the "
            f"fastest now: the cores have other work, too."
        )
    _tell("\n" + _folded(text))


def _cells(row: Row) -> list[str]:
    time, ratio = ("", "") if row.seconds is None else (in_time(row.seconds), f"{row.ratio:.2f}x")
    found = "all right" if row.checked else ""
    if row.wrong:
        found = f"{row.wrong:,} wrong"
    if row.refused or row.failed:
        found = "refused" if row.refused else "failed"
    return [row.backend, row.call, row.way, time, ratio, found]


def _tell_choice(
    candidates: Sequence[Candidate], device: torch.device, forced: str | None, run: Sequence[str]
) -> None:
    _tell(f"\n3. What the registry chooses for {device}\n")
    print_candidates(candidates, "")
    chosen = next((c["name"] for c in candidates if c["chosen"]), "nothing")
    why = f"{ENVIRONMENT} forces it" if forced else "the first that is accepted, in this order"
    text = f"{chosen} is chosen: {why}."
    for name in (c["name"] for c in candidates if c["accepted"] and not forced):
        if name not in run:
            text += f" {name} is used only if it is asked for, so the demo did not run it."
    _tell("\n" + _folded(text))


def _tell_result(skipped: str | None, identical: bool, rows: Sequence[Row], seconds: float) -> None:
    failed = dict.fromkeys(row.backend for row in rows if not row.good)
    proven = dict.fromkeys(row.backend for row in rows if row.right and row.backend not in failed)
    right = ", ".join(proven)
    wrong = ", ".join(failed)
    logits = "bit-identical" if identical else "NOT bit-identical, or the control did not differ"
    _tell(f"\nlogits    {'not tried, see above' if skipped else logits}")
    _tell(f"bytes     all right through {right}" if right else "bytes     right through no backend")
    if wrong:
        _tell(f"          WRONG or missing through {wrong}")
    _tell(f"time      {seconds:.0f} s")
