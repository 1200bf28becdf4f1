# SPDX-License-Identifier: Apache-2.0
"""Measure the shapes, arrangements, index lists and backends of a preset, and relate their rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import torch

from portakv import AdaptiveConnector, BlockTransfer, Index, KVView, copy_blocks, copy_rows
from portakv.cli.demo import free_memory
from portakv.cli.sides import Shape
from portakv.errors import PortaKVError
from portakv.registry.registry import STRATEGIES, trace
from portakv.view.bound import Tensors
from portakv_benchmarks.device.workload import Workload
from portakv_benchmarks.shared import harness
from portakv_benchmarks.shared.harness import Call, Measured, Row, Rows, Timer, Variant
from portakv_benchmarks.shared.peers import LMCache

#: Backends that compile each plan for seconds: measured with a few shapes and slots only.
COMPILING = ("compiled",)
#: Payloads in bytes below which a row is the median of several measurements: `copy_` itself moves
#: by 2 % within a run there.
REPEATED_BELOW = 50_000_000
#: Share of the free memory that one workload may take.
_SHARE = 0.85


@dataclass(frozen=True, slots=True)
class Preset:
    """Set the amount of measurement. ``seconds`` bounds the rounds of one measurement."""

    shapes: tuple[str, ...] | None  # None: all
    index: tuple[str, ...]
    together: bool  # also with all layers in one allocation
    rounds: int
    seconds: float
    overhead_rounds: int
    repeats: int = 1  # of payloads below `REPEATED_BELOW`
    compiling: bool = True  # also the backends of `COMPILING`
    all_methods: bool = False  # also every method of moving the founding scenario
    starts: int = 0  # fresh processes of each kind


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(("seed",), ("random", "blocks"), False, 15, 5.0, 500, compiling=False),
    "core": Preset(
        ("seed", "seed-fp8", "llama3-8b-chunk", "llama3-70b-tp8", "deepseek-mla"),
        ("random", "blocks"),
        True,
        41,
        20.0,
        3000,
        all_methods=True,
    ),
    "full": Preset(
        None,
        ("random", "contiguous", "blocks"),
        True,
        31,
        6.0,
        3000,
        repeats=3,
        all_methods=True,
        starts=3,
    ),
}


class Task(NamedTuple):
    """One workload to measure, or why it is left out."""

    shape: Shape
    arrangement: str
    left_out: str = ""

    def __str__(self) -> str:
        return f"{self.shape.name}, layers {self.arrangement}"


class Field(NamedTuple):
    """The subjects that are compared with `copy_`, and the timer."""

    backends: Sequence[str]
    peers: Sequence[LMCache]
    timer: Timer
    device: torch.device
    left_out: list[str]  # a line on each thing that was not measured


def accepted_backends(device: torch.device) -> list[str]:
    """Return the names of the backends that serve a device, in the registry's order.

    ``--host`` measures the strategies between the device and the host.
    """
    return [d.name for d in trace(device) if d.accepted and d.name not in STRATEGIES]


def tasks(preset: Preset, shapes: Sequence[Shape], device: torch.device) -> Iterator[Task]:
    """Yield the workloads of a preset; those that the machine's memory cannot hold are left out.

    Shapes for backends that compile come last, so that nothing waits for them.
    """
    for shape in sorted(shapes, key=lambda shape: shape.compiled):
        arrangements = ["apart"] if shape.layered and shape.apart else []
        if not arrangements or (preset.together and shape.together):
            arrangements.append("together")
        for arrangement in arrangements:
            needed = shape.payload * (2 * shape.pool + 2 * shape.objects)
            free = free_memory(device) or 1 << 32
            why = f"needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            yield Task(shape, arrangement, why if needed > _SHARE * free else "")


def run_task(task: Task, preset: Preset, field: Field) -> Rows:
    """Measure one workload by every method; return a row for each, that of `copy_` first.

    Each repeat has separate memory.
    """
    shape = task.shape
    if task.left_out:
        field.left_out.append(f"{task}: {task.left_out}")
        return []
    repeats = preset.repeats if shape.payload < REPEATED_BELOW else 1
    runs: list[list[Measured]] = []
    for repeat in range(repeats):
        work = Workload(shape, task.arrangement, field.device, shape.objects)
        left_out = field.left_out if repeat == 0 else []  # the others leave out the same
        good = harness.usable(
            _variants(work, preset, field, f"{task}", left_out), f"{task}", left_out
        )
        limits = shape.objects, preset.rounds, preset.seconds
        runs.append(harness.measure(ceiling(work), good, field.timer, *limits))
        del work, good
    return [_row(task, field.timer, one) for one in harness.merge(runs)]


def ceiling(work: Workload) -> Variant:
    """Return `copy_` of the bytes of one memory object to another."""
    return Variant(
        {"backend": "copy_", "op": "copy_", "index": "none", "call": "Tensor.copy_"},
        lambda i: work.stored[i].copy_(work.loaded[i]),
        work.poison_stored,
        work.copied_right,
    )


def _variants(
    work: Workload, preset: Preset, field: Field, place: str, left_out: list[str]
) -> list[Variant]:
    """Return every method of moving a workload; add a line for each that cannot be made."""
    results: list[Variant] = []
    for index in (index for index in work.shape.index if index in preset.index):
        made = [(name, _backend_methods(work, name, index)) for name in field.backends]
        made += [(peer.name, peer_methods(peer, work, index)) for peer in field.peers]
        for name, methods in made:
            try:
                results += methods
            except PortaKVError as error:
                left_out.append(f"{place}, {name} {index}: {error}")
    return results


def _backend_methods(work: Workload, backend: str, index: str) -> Iterator[Variant]:
    if backend not in COMPILING:
        yield from connector_methods(work, backend, index)
    elif index == "random" and work.shape.compiled:
        yield from connector_methods(work, backend, index)
        if work.device.type == "cuda":
            yield from map(replayed, connector_methods(work, backend, index, capturable=True))


def replayed(variant: Variant) -> Variant:
    """Return the same call captured into a CUDA graph, one for each memory object, and replayed."""
    graphs: dict[int, torch.cuda.CUDAGraph] = {}

    def replay(i: int) -> None:
        if i not in graphs:
            # Prepared before it is captured, and ended: no event is queried inside the capture.
            prepared: Any = variant.call(i)
            prepared.synchronize()
            torch.cuda.synchronize()
            variant.poison(i)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                variant.call(i)
            graphs[i] = graph
        graphs[i].replay()

    labels = {**variant.labels, "backend": f"{variant.labels['backend']} graph"}
    return Variant({**labels, "call": "graph replay"}, replay, variant.poison, variant.right)


def connector_methods(
    work: Workload, backend: str, index: str, capturable: bool = False
) -> Iterator[Variant]:
    """Yield gather and scatter through one backend, as a caller of PortaKV writes them.

    With ``capturable`` the slots lie on the device, as a capture into a graph needs them.
    """
    ids = work.ids(index)
    if index == "blocks":
        yield from _by_blocks(work, backend, ids)
        return
    slot_index = Index(ids.to(work.device) if capturable else ids)
    source, target = (_connector(work, backend, caches) for caches in (work.source, work.target))
    yield from both_directions(
        work,
        index,
        backend,
        ("from_gpu", "to_gpu"),
        lambda i: source.from_gpu(work.stored[i], slot_mapping=slot_index),
        lambda i: target.to_gpu(work.loaded[i], slot_mapping=slot_index),
    )


def _by_blocks(work: Workload, backend: str, ids: torch.Tensor) -> Iterator[Variant]:
    """Yield gather and scatter through `copy_blocks`.

    On an accelerator they go through `copy_rows` with an `Index` that the caller keeps: ids that
    each call copied to the device would make the host wait in the middle of the call.
    """
    shape = work.shape
    block_index: torch.Tensor | Index = ids
    copy: Callable[..., BlockTransfer] = copy_blocks
    if work.device.type != "cpu":
        block_index = Index(ids, step=shape.block_size)
        copy = copy_rows
    source, target = (KVView(caches, shape.cache) for caches in (work.source, work.target))
    extents: Row = {"kv": shape.kv} if "kv" in shape.chunk else {}
    extents |= {"heads": shape.heads} if "(head dim)" in shape.chunk else {}

    def chunk(tensor: torch.Tensor) -> KVView:
        return KVView(tensor, shape.chunk, **extents)

    yield from both_directions(
        work,
        "blocks",
        backend,
        (copy.__name__, copy.__name__),
        lambda i: copy(source, chunk(work.stored[i]), block_index, None, backend=backend),
        lambda i: copy(chunk(work.loaded[i]), target, None, block_index, backend=backend),
    )


def _connector(work: Workload, backend: str, caches: Tensors) -> AdaptiveConnector:
    made = AdaptiveConnector(work.device, backend, work.shape.cache, work.shape.chunk)
    made.register_kv_caches(caches)
    return made


def peer_methods(peer: LMCache, work: Workload, index: str) -> Iterator[Variant]:
    """Yield gather and scatter by each kernel of a peer that takes such an index list.

    Raises `PeerMissing` if it does not carry such a shape out.
    """
    slots = work.slots(index)
    for kernel in peer.kernels(work.shape, index != "random"):
        store, load = (
            peer.move_by(kernel, work.shape, slots, caches) for caches in (work.source, work.target)
        )
        yield from both_directions(
            work,
            index,
            f"{peer.name} {kernel}",
            (kernel, kernel),
            partial(lambda move, i: move(work.stored[i], True), store),
            partial(lambda move, i: move(work.loaded[i], False), load),
            peer=peer.name,
        )


def both_directions(
    work: Workload,
    index: str,
    backend: str,
    calls: tuple[str, str],
    store: Call,
    load: Call,
    **labels: str,
) -> Iterator[Variant]:
    """Yield a gather and a scatter, with their checks; ``calls`` are their names."""
    labels = {"backend": backend, "index": index, **labels}
    yield Variant(
        {**labels, "op": "gather", "call": calls[0]},
        store,
        work.poison_stored,
        lambda i: work.stored_right(i, index),
    )
    yield Variant(
        {**labels, "op": "scatter", "call": calls[1]},
        load,
        lambda i: work.poison_target(),
        lambda i: work.target_right(i, index),
    )


def _row(task: Task, timer: Timer, one: Measured) -> Row:
    shape = task.shape
    return {
        "kind": "copy",
        "shape": shape.name,
        "layers": task.arrangement,
        **one.labels,
        "cache": shape.cache,
        "chunk": shape.chunk,
        "dtype": shape.dtype,
        "row_bytes": shape.row_bytes,
        "payload_bytes": shape.payload,
        "tokens": shape.tokens,
        "pool_slots": shape.slots,
        "pool_bytes": shape.layers * shape.kv * shape.slots * shape.row_bytes,
        "slots_used": harness.short(shape.slots_used),
        **one.row(2 * shape.payload),
        "repeats": [harness.short(ratio) for ratio in one.repeats],
        "timer": timer.name,
    }


def relate(rows: Rows) -> None:
    """Write into the rows of copies ``to_cuda``, a backend's time / that of `cuda`; ``to_peer``,
    its time / that of the peer's fastest right kernel, and which one that is, ``best_peer``."""
    moved = [row for row in rows if row.get("op") in ("gather", "scatter")]
    copies = harness.having(moved, kind="copy")
    for group in harness.grouped(copies, "shape", "layers", "op", "index"):
        relate_copies(group)
    for group in harness.grouped(harness.having(moved, kind="ladder"), "op"):
        for fastest, row in product(harness.having(group, way="cuda"), group):
            row["to_cuda"] = _times(row, fastest)


def relate_copies(group: Rows) -> None:
    """Relate the rows of one workload, direction and index list; see `relate`."""
    own = [row for row in group if not row.get("peer")]
    best = harness.quickest(row for row in group if row.get("peer"))
    for row in own:
        for fastest in harness.having(own, backend="cuda"):
            if row is not fastest:
                row["to_cuda"] = _times(row, fastest)
        if best is not None:
            row["to_peer"] = _times(row, best)
            row["best_peer"] = best["backend"]


def peer_failures(rows: Rows) -> list[str]:
    """Return a line for each wrong result of a peer."""
    wrong = [row for row in rows if row.get("peer") and not row["verified"]]
    line = "{shape}, layers {layers}, {backend} {op} {index}: some bytes were wrong"
    return [line.format_map(row) for row in wrong]


def _times(row: Row, other: Row) -> float:
    return harness.short(row["p50_us"] / other["p50_us"])
