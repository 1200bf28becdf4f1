# SPDX-License-Identifier: Apache-2.0
"""`portakv demo`: move a model's KV cache out and back, then check and time the backends.

The demo uses the library as a user does. The expected bytes come from plain torch indexing alone.
It prints three parts in 80 columns, each with the work done and the conclusion.
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

import torch

from portakv import __version__
from portakv.cli.backends import Candidate, candidates_for, print_candidates
from portakv.cli.console import Column, Report, installing, print_json, print_table
from portakv.cli.demo import moves
from portakv.cli.demo.moves import FOUNDING, Founding, Row, Scenario
from portakv.cli.sides import in_bytes, in_time
from portakv.errors import PortaKVError
from portakv.registry.registry import ENVIRONMENT, REGISTRY, choose
from portakv.runtime.devices import device_name, usual_device

EXAMPLE = "portakv.cli.demo.offload_transformers"


def run_demo(*, device: str | None = None, json: bool = False) -> int:
    """Run the demo on a device, by default the accelerator, else the CPU.

    With ``json`` the demo prints one JSON object and nothing else.

    Returns:
        The exit code: 0 if logits were bit-identical and every byte was right, else 1.

    Raises:
        BackendUnavailable: no backend, or not the forced backend, serves the device. Raised before
            any work.
        Unsupported: the backend that ``PORTAKV_BACKEND`` forces does not accept a copy.
    """
    with redirect_stdout(io.StringIO()) if json else nullcontext():
        report = _demo(device)
    if json:
        print_json(report)
    return 0 if report["ok"] else 1


def _demo(device: str | None) -> Report:
    """Run and print the three parts; return them as JSON."""
    choice = choose(usual_device() if device is None else device)
    where = choice.backend.device
    forced = os.environ.get(ENVIRONMENT) or None
    began = time.perf_counter()
    _print_heading(where, forced)
    model = run_model(where)
    scenario = moves.fitted(FOUNDING, moves.free_memory(where))
    # The backends that the registry may choose here, or the forced backend alone.
    names = [choice.name] if forced else REGISTRY.automatic(where)
    serving = [n for n in names if REGISTRY.ask(n, where, check=True)[0] is not None]
    _print_scenario(scenario, where, serving)
    rows, threads = moves.measured(Founding(where, scenario), serving, forced is not None)
    _print_rows(rows, threads)
    candidates = candidates_for(where)
    _print_choice(candidates, where, forced, serving)
    identical = bool(model["skipped"]) or (model["identical"] and model["control_differs"])
    _print_result(model["skipped"], identical, rows, time.perf_counter() - began)
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


def run_model(device: torch.device) -> Report:
    """Run the example on ``device``, print its lines immediately, and return its result.

    In the result, ``story`` has the lines, and ``skipped`` is None or why the example did not run.
    A `transformers` that is missing, fails to import or is not supported is reported, not raised.
    """
    try:
        example = importlib.import_module(EXAMPLE)
    except (
        ImportError,
        PortaKVError,
    ) as error:  # also an unsupported release
        if (getattr(error, "name", "") or "").startswith("portakv"):
            raise
        why = f"it needs transformers ({error}); {installing('demo')} adds it"
        _show(f"  skipped  {why}")
        return {"skipped": why, "story": []}
    story: list[str] = []

    def show_line(line: str) -> None:
        story.append(line)
        _show(f"  {line}")

    return {"skipped": None, **vars(example.main(device, show_line)), "story": story}


def _show(text: str) -> None:
    # Flush, also into a pipe: the demo takes seconds, and users want to see each part.
    print(text, flush=True)


def _folded(text: str) -> str:
    return textwrap.fill(text, 80)


def _print_heading(device: torch.device, forced: str | None) -> None:
    threads = torch.get_num_threads()
    cores = ""
    if device.type == "cpu":
        cores = "1 thread" if threads == 1 else f"{threads} threads"
    where = ", ".join(part for part in (str(device), device_name(device), cores) if part)
    _show(f"PortaKV {__version__}, torch {torch.__version__}, on {where}")
    if forced:
        _show(f"{ENVIRONMENT}={forced} is set: that backend runs alone.")
    _show("\n1. A model's KV cache leaves its pages and comes back in others\n")
    _show("The model is a small Llama with random weights; nothing is downloaded.\n")


def _print_scenario(s: Scenario, device: torch.device, serving: Sequence[str]) -> None:
    _show(f"\n2. {in_bytes(s.payload)} of KV cache through {', '.join(serving)}\n")
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
    _show(_folded(text))


def _print_rows(rows: Sequence[Row], threads: int | None) -> None:
    numbers = ("time", "vs copy_")
    names = ("backend", "call", "what moves", *numbers, "bytes")
    columns = [Column(name, whole=True, right=name in numbers) for name in names]
    _show("")
    print_table(columns, [_cells(row) for row in rows])
    _show("")
    for row in rows:
        why = row.refused or row.failed
        if why:
            how = "rejected" if row.refused else "failed"
            _show(_folded(f"{row.backend}, {row.call}, {row.route}, {how}: {why}"))
    text = (
        f"bytes: {in_bytes(sum(row.checked for row in rows if row.right))} are the same as by "
        f"plain torch indexing, including the pages that a copy must not change."
    )
    wrong = sum(row.wrong for row in rows)
    if wrong:
        text += f" {wrong:,} bytes of other copies are WRONG."
    _show(_folded(text))
    text = (
        "vs copy_: the time of torch's copy_ of the same bytes from one dense chunk to another "
        f"/ this time; 1.00x is as fast. Medians of {moves.ROUNDS} rounds of all copies."
    )
    if threads is not None and threads < torch.get_num_threads():
        text += (
            f" All use {threads} of {torch.get_num_threads()} threads, with which they are the "
            f"fastest now: the cores have other work, too."
        )
    _show("\n" + _folded(text))


def _cells(row: Row) -> list[str]:
    time = ""
    ratio = ""
    if row.seconds is not None:
        time = in_time(row.seconds)
        ratio = f"{row.ratio:.2f}x"
    result = "all right" if row.checked else ""
    if row.wrong:
        result = f"{row.wrong:,} wrong"
    if row.refused or row.failed:
        result = "rejected" if row.refused else "failed"
    return [row.backend, row.call, row.route, time, ratio, result]


def _print_choice(
    candidates: Sequence[Candidate], device: torch.device, forced: str | None, run: Sequence[str]
) -> None:
    _show(f"\n3. What the registry chooses for {device}\n")
    print_candidates(candidates, "")
    chosen = next((c["name"] for c in candidates if c["chosen"]), "nothing")
    why = f"{ENVIRONMENT} forces it" if forced else "the first accepted backend in this order"
    text = f"{chosen} is chosen: {why}."
    for name in (c["name"] for c in candidates if c["accepted"] and not forced):
        if name not in run:
            text += f" {name} is used only on request, so the demo did not run it."
    _show("\n" + _folded(text))


def _print_result(
    skipped: str | None, identical: bool, rows: Sequence[Row], seconds: float
) -> None:
    failed = dict.fromkeys(row.backend for row in rows if not row.good)
    proven = dict.fromkeys(row.backend for row in rows if row.right and row.backend not in failed)
    right = ", ".join(proven)
    wrong = ", ".join(failed)
    logits = "bit-identical" if identical else "NOT bit-identical, or the control did not differ"
    _show(f"\nlogits    {'not run, see above' if skipped else logits}")
    _show(f"bytes     all right through {right}" if right else "bytes     right through no backend")
    if wrong:
        _show(f"          WRONG or missing through {wrong}")
    _show(f"time      {seconds:.0f} s")
