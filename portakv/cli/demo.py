# SPDX-License-Identifier: Apache-2.0
"""`portakv demo`: move a model's KV cache out and back, then check and time the backends.

The demo uses the library as a user does. The expected bytes come from plain torch indexing alone.
It prints three parts in 80 columns, each with the work done and the conclusion. The second part
times the copies of each backend and plain torch alternately, in rounds.
"""

from __future__ import annotations

import argparse
import importlib
import io
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import NamedTuple, cast

import torch

from portakv import __version__
from portakv.cli.backends import Candidate, candidates_for, forced_backend, print_candidates
from portakv.cli.console import Report, installing, print_json, print_rows
from portakv.cli.sides import Shape, device_of, in_bytes, in_time
from portakv.connector.connector import AdaptiveConnector
from portakv.copy.rows import copy_blocks
from portakv.errors import PortaKVError, Unsupported
from portakv.host.pinned import available
from portakv.registry.registry import ENVIRONMENT, REGISTRY, choose
from portakv.runtime.devices import device_name
from portakv.runtime.transfer import Transfer
from portakv.view.index import Index
from portakv.view.view import KVView

HELP = "move a model's KV cache out and back, and time the backends of this machine"
DESCRIPTION = """\
Moves the KV cache of a small Llama with random weights out of its paged memory
and back into other slots, with the next tokens unchanged; then checks and times
the backends that PortaKV chooses from here. Nothing is downloaded."""

#: The first part: a link to the script in `examples/`, so that users read what the command runs.
EXAMPLE = "portakv.cli.offload_transformers"
ROUNDS = 9
#: Copies between two events on a device, so that the host's part of the first counts little.
REPEATS = 10
#: The content of destinations before a copy; random bits do not repeat it.
POISON = 0x5A5AC3C35A5AC3C3

Work = Callable[[], object]


#: The first scenario of PortaKV.
FOUNDING = Shape(
    name="founding",
    model="a 7B model with multi-head attention",
    source="the numbers of Llama-2 7B",
    cache="layer | kv block token head dim",
    chunk="kv layer token (head dim)",
    layers=32,
    heads=32,
    dim=128,
    dtype="float16",
    block_size=16,
    tokens=128,
)


def pool_bytes(s: Shape) -> int:
    """Return the bytes of the paged caches."""
    return s.payload // s.tokens * s.slots


def fitted(scenario: Shape, free: int | None) -> Shape:
    """Return the scenario, with fewer layers if it needs more than half of ``free`` bytes."""
    reduced = scenario
    while free is not None and reduced.layers > 1:
        pool = pool_bytes(reduced)
        # Two pools, three chunks, and memory for checks.
        if 2 * pool + 3 * reduced.payload + 4 * pool // reduced.layers <= free // 2:
            break
        reduced = replace(reduced, layers=reduced.layers // 2)
    return reduced


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes on ``device``; None if the system does not report them."""
    with suppress(OSError, AttributeError):  # no /proc, or a module without `mem_get_info`
        if device.type == "cpu":
            return available()
        return int(torch.get_device_module(device).mem_get_info(device)[0])
    return None


class Founding:
    """A scenario's tensors.

    Attributes:
        pool, target: the paged caches that are read, with random bits, and written. ``read`` and
            ``written`` are their rows: for each layer ``[2, slots, heads * dim]``.
        stored, chunk: the dense chunks ``[2, layers, tokens, heads * dim]`` that are read, with
            random bits, and written.
        slots, blocks: slots of tokens and ids of blocks, in random order, int64 on the device.
        slots_of_blocks: the slots of these blocks' tokens, by plain arithmetic.
    """

    def __init__(self, device: torch.device, s: Shape) -> None:
        self.device = device
        self.scenario = s
        draw = torch.Generator().manual_seed(0)
        paged = (2, s.blocks, s.block_size, s.heads, s.dim)
        self.pool = [_random_bits(paged, draw).to(device) for _ in range(s.layers)]
        self.target = [torch.empty_like(layer) for layer in self.pool]
        self.read, self.written = (
            [layer.flatten(1, 2).flatten(2) for layer in each] for each in (self.pool, self.target)
        )
        dense = (2, s.layers, s.tokens, s.heads * s.dim)
        self.stored = _random_bits(dense, draw).to(device)
        self.chunk = torch.empty_like(self.stored)
        self.slots = torch.randperm(s.slots, generator=draw)[: s.tokens].to(device)
        drawn = torch.randperm(s.blocks, generator=draw)
        self.blocks = drawn[: s.tokens // s.block_size].to(device)
        within = torch.arange(s.block_size, device=device)
        self.slots_of_blocks = (self.blocks[:, None] * s.block_size + within).flatten()

    def poison(self) -> None:
        """Fill both destinations with `POISON`, which no copy writes."""
        for tensor in (*self.target, self.chunk):
            tensor.view(torch.int64).fill_(POISON)

    def wrong_in_chunk(self, slots: torch.Tensor) -> int:
        """Return the bytes of ``chunk`` that differ from the rows of ``pool`` at ``slots``."""
        chunk = self.chunk.unbind(1)
        return sum(_differing(x, y[:, slots]) for x, y in zip(chunk, self.read, strict=True))

    def wrong_in_target(self, slots: torch.Tensor) -> int:
        """Return the bytes of ``target`` that differ from ``stored`` at ``slots``, else poison."""
        wrong = 0
        for stored, written in zip(self.stored.unbind(1), self.written, strict=True):
            expected = torch.full_like(written.view(torch.int64), POISON).view(written.dtype)
            expected[:, slots] = stored
            wrong += _differing(written, expected)
        return wrong


def _random_bits(shape: tuple[int, ...], draw: torch.Generator) -> torch.Tensor:
    """Return random fp16 bit patterns, drawn on the CPU: the same bits for every device."""
    bits = torch.empty((*shape[:-1], shape[-1] // 4), dtype=torch.int64)
    return bits.random_(-(2**63), None, generator=draw).view(torch.float16)


def _differing(actual: torch.Tensor, expected: torch.Tensor) -> int:
    """Return the number of bytes that differ, also in bits of NaNs."""
    if torch.equal(actual.view(torch.int64), expected.view(torch.int64)):
        return 0  # takes a tenth of the time of the comparison below
    return int((actual.view(torch.uint8) != expected.view(torch.uint8)).sum())


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    backend: str  # the name; "torch" for plain torch with the same bytes
    call: str
    route: str  # the source and destination, in words
    checked: int = 0  # compared bytes
    wrong: int = 0  # bytes that differ from those of plain torch indexing
    refused: str | None = None  # why the backend does not accept this copy, by its message
    failed: str | None = None  # the error of the copy
    seconds: float | None = None  # the median time of one copy; None if it was not timed
    ratio: float | None = None  # the seconds of ``copy_`` / ``seconds``; 1 is as fast

    @property
    def good(self) -> bool:
        """Return True unless bytes were wrong or the copy failed; it may be rejected."""
        return not self.wrong and not self.failed

    @property
    def right(self) -> bool:
        """Return True if bytes were compared and all are right."""
        return self.good and not self.refused and self.checked > 0

    @property
    def result(self) -> str:
        """Return in words what became of the bytes."""
        if self.refused:
            return "rejected"
        if self.failed:
            return "failed"
        if self.wrong:
            return f"{self.wrong:,} wrong"
        return "all right" if self.checked else ""


class _Move(NamedTuple):
    """A copy, and the function that counts its wrong bytes; None for plain torch."""

    row: Row
    run: Work
    wrong: Callable[[], int] | None = None


def measured(founding: Founding, backends: Sequence[str], forced: bool) -> list[Row]:
    """Check every copy of every backend, then time the right copies in rounds.

    Returns:
        A row for each copy, plain torch first and `copy_` before all.

    Raises:
        Unsupported: a ``forced`` backend does not accept a copy.
    """
    moves = [*_plain(founding), *(move for name in backends for move in _moves(founding, name))]
    rows = [_checked(founding, move, forced) for move in moves]
    timed = [i for i, row in enumerate(rows) if row.right or row.backend == "torch"]
    times = interleaved(founding.device, [moves[i].run for i in timed])
    for i, own in zip(timed, times, strict=True):
        rows[i] = replace(rows[i], seconds=own, ratio=times[0] / own)
    return rows


def interleaved(device: torch.device, works: Sequence[Work]) -> list[float]:
    """Return each work's median seconds in `ROUNDS` rounds, after a warm-up round."""
    taken = [[seconds(device, work) for work in works] for _ in range(ROUNDS + 1)]
    return [median(times) for times in zip(*taken[1:], strict=True)]


def seconds(device: torch.device, work: Work) -> float:
    """Return the seconds of one run; on a device by its events, as a mean of `REPEATS` runs."""
    if device.type == "cpu":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    first, last = (torch.Event(device, enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(REPEATS):
        work()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3 / REPEATS


def _checked(founding: Founding, move: _Move, forced: bool) -> Row:
    if move.wrong is None:
        return move.row
    founding.poison()
    try:
        cast(Transfer, move.run()).synchronize()
        return replace(move.row, wrong=move.wrong())
    except Unsupported as error:
        if forced:
            raise
        return replace(move.row, refused=str(error))
    except Exception as error:  # the failure of a backend must not hide the results of the others
        return replace(move.row, failed=f"{type(error).__name__}: {error}")


def _plain(f: Founding) -> list[_Move]:
    """Return copies of the same bytes by plain torch: one dense copy, and indexing by layers."""

    def gather() -> None:
        for chunk, cache in zip(f.chunk.unbind(1), f.read, strict=True):
            chunk.copy_(cache[:, f.slots])

    def scatter() -> None:
        for stored, cache in zip(f.stored.unbind(1), f.written, strict=True):
            cache[:, f.slots] = stored

    tokens = f.scenario.tokens
    return [
        _Move(Row("torch", "copy_", "chunk -> chunk"), partial(f.chunk.copy_, f.stored)),
        _Move(Row("torch", "indexing", f"{tokens} slots -> chunk"), gather),
        _Move(Row("torch", "indexing", f"chunk -> {tokens} slots"), scatter),
    ]


def _moves(f: Founding, backend: str) -> list[_Move]:
    """Return gather and scatter, by slots with a connector and by block ids with `copy_blocks`."""
    s = f.scenario
    reader, writer = (AdaptiveConnector(f.device, backend) for _ in range(2))
    reader.register_kv_caches(f.pool)
    writer.register_kv_caches(f.target)
    pool, target = (KVView(x, s.cache) for x in (f.pool, f.target))
    chunk, stored = (KVView(x, s.chunk, heads=s.heads) for x in (f.chunk, f.stored))

    slots = f"{s.tokens} slots"
    blocks = f"{len(f.blocks)} blocks"
    written = pool_bytes(s)
    index = Index(f.slots)
    by_block = partial(copy_blocks, backend=backend)
    return [
        _Move(
            Row(backend, "from_gpu", f"{slots} -> chunk", s.payload),
            partial(reader.from_gpu, f.chunk, slot_mapping=index),
            partial(f.wrong_in_chunk, f.slots),
        ),
        _Move(
            Row(backend, "to_gpu", f"chunk -> {slots}", written),
            partial(writer.to_gpu, f.stored, slot_mapping=index),
            partial(f.wrong_in_target, f.slots),
        ),
        _Move(
            Row(backend, "copy_blocks", f"{blocks} -> chunk", s.payload),
            partial(by_block, pool, chunk, f.blocks, None),
            partial(f.wrong_in_chunk, f.slots_of_blocks),
        ),
        _Move(
            Row(backend, "copy_blocks", f"chunk -> {blocks}", written),
            partial(by_block, stored, target, None, f.blocks),
            partial(f.wrong_in_target, f.slots_of_blocks),
        ),
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument("--device", help="a torch device (default: the accelerator, else cpu)")


def run(args: argparse.Namespace) -> int:
    """Run the demo. Return 0 if logits were bit-identical and every byte was right, else 1.

    Raises:
        BackendUnavailable: no backend, or not the forced backend, serves the device. Raised before
            any work.
        Unsupported: the backend that ``PORTAKV_BACKEND`` forces does not accept a copy.
    """
    with redirect_stdout(io.StringIO()) if args.json else nullcontext():
        report = _demo(device_of(args.device))
    if args.json:
        print_json(report)
    return 0 if report["ok"] else 1


#: What the report has of the scenario.
_SHOWN = ("layers", "tokens", "heads", "dim", "block_size", "blocks", "dtype")


def _demo(device: torch.device) -> Report:
    """Run and print the three parts; return them as JSON."""
    choice = choose(device)
    where = choice.backend.device
    forced = forced_backend()
    began = time.perf_counter()
    _print_heading(where, forced)
    model = run_model(where)
    scenario = fitted(FOUNDING, free_memory(where))
    # The backends that the registry may choose here, or the forced backend alone.
    names = [choice.name] if forced else REGISTRY.automatic(where)
    serving = [n for n in names if REGISTRY.ask(n, where, check=True)[0] is not None]
    _print_scenario(scenario, where, serving)
    rows = measured(Founding(where, scenario), serving, forced is not None)
    _print_rows(rows)
    candidates = candidates_for(where)
    _print_choice(candidates, where, forced, serving)
    identical = bool(model["skipped"]) or (model["identical"] and model["control_differs"])

    failed = dict.fromkeys(row.backend for row in rows if not row.good)
    right = dict.fromkeys(row.backend for row in rows if row.right and row.backend not in failed)
    logits = "bit-identical" if identical else "NOT bit-identical, or the control did not differ"
    if model["skipped"]:
        logits = "not run, see above"
    _show(f"\nlogits    {logits}")
    proven = f"all right through {', '.join(right)}" if right else "right through no backend"
    _show(f"bytes     {proven}")
    if failed:
        _show(f"          WRONG or missing through {', '.join(failed)}")
    _show(f"time      {time.perf_counter() - began:.0f} s")
    return {
        "portakv": __version__,
        "torch": str(torch.__version__),
        "device": str(where),
        "device_name": device_name(where),
        "forced": forced,
        "model": model,
        "scenario": {
            **{name: getattr(scenario, name) for name in _SHOWN},
            "full_layers": FOUNDING.layers,
            "payload_bytes": scenario.payload,
        },
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
    where = [str(device), device_name(device)]
    if device.type == "cpu":
        threads = torch.get_num_threads()
        where.append("1 thread" if threads == 1 else f"{threads} threads")
    known = ", ".join(filter(None, where))
    _show(f"PortaKV {__version__}, torch {torch.__version__}, on {known}")
    if forced:
        _show(f"{ENVIRONMENT}={forced} is set: that backend runs alone.")
    _show("\n1. A model's KV cache leaves its pages and comes back in others\n")
    _show("The model is a small Llama with random weights; nothing is downloaded.\n")


def _print_scenario(s: Shape, device: torch.device, serving: Sequence[str]) -> None:
    _show(f"\n2. {in_bytes(s.payload)} of KV cache through {', '.join(serving)}\n")
    text = (
        f"{s.tokens} tokens of {s.layers} layers, keys and values, {s.heads} heads of {s.dim} "
        f"fp16 numbers, between paged caches of {s.blocks} blocks of {s.block_size} tokens "
        f"({in_bytes(pool_bytes(s))}) and a dense chunk."
    )
    if s.layers < FOUNDING.layers:
        text += (
            f" Scaled down: {FOUNDING.layers} layers would take more than half of the free memory "
            f"of {device}."
        )
    _show(_folded(text))


def _print_rows(rows: Sequence[Row]) -> None:
    numbers = ("time", "vs copy_")
    _show("")
    print_rows(
        ("backend", "call", "what moves", *numbers, "bytes"),
        [_cells(row) for row in rows],
        right=numbers,
    )
    _show("")
    for row in rows:
        why = row.refused or row.failed
        if why:
            _show(_folded(f"{row.backend}, {row.call}, {row.route}, {row.result}: {why}"))
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
        f"/ this time; 1.00x is as fast. Medians of {ROUNDS} rounds of all copies."
    )
    _show("\n" + _folded(text))


def _cells(row: Row) -> list[str]:
    times = ["", ""]
    if row.seconds is not None:
        times = [in_time(row.seconds), f"{row.ratio:.2f}x"]
    return [row.backend, row.call, row.route, *times, row.result]


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
