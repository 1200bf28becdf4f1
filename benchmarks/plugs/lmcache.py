# SPDX-License-Identifier: Apache-2.0
"""Measure LMCache's ops as its connectors and its daemon call them, with its code and PortaKV's.

The path of its engine-driven connector, from caches to chunks and back, is measured with both, too.

Its own are the compiled ones if they load here, by addresses; else the torch ops of its package, by
tensors, as it has them on devices without kernels. Of these the calls of torch and the waits of the
host are counted, too: 32 layers, two objects in pageable memory.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import product
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from portakv.cli.sides import Shape
from portakv.errors import PortaKVError
from portakv.integrations.lmcache import ops as lmcache_ops
from portakv.integrations.lmcache.formats import FUSED, LAYOUTS, MLA
from portakv_benchmarks.host.cases import DIRECTIONS
from portakv_benchmarks.plugs import suite
from portakv_benchmarks.plugs.suite import (
    OURS,
    OWN,
    Call,
    Case,
    IntegrationBench,
    PlannedCase,
    Side,
)
from portakv_benchmarks.shared.harness import Rows, Step, in_a_line, short
from portakv_benchmarks.shared.peers import load
from portakv_benchmarks.shared.shapes import in_words

#: Where its ops are: up to 0.5.3, from 0.5.4 on, and over torch alone.
_MODULES = ("c_ops", "cuda_ops", "v1.platform.torch_ops")
_BLOCK = 16
_HEADS = 8
_DIM = 128
_LATENT = 576
_NARROW = 32  # elements of the one head of narrow rows
#: Pages of 14, values before scales, are not rows. By slots LMCache reads a pool of 0 as layers,
#: and knows no 8; its torch op reads keys and values in one row as two planes.
_FORMATS = [number for number in LAYOUTS if number != 14]
_KERNELS = ("slots", "blocks", "connector")
_AS_LAYERS = {0: 1}
_OURS_ALONE = 8
# of tensors for each layer; planes of a token in an object
_TUPLES = (16, 17)
_SIDE_BY_SIDE = 17
#: What the connector's path is measured with, and what it calls its modules' ops.
_CONNECTOR = (1, 7)
_OP = "multi_layer_block_kv_transfer"
_PATH = "lmcache.v1.multiprocess.transfer_context.base"
_UNILATERAL = (4, 5, 9)
_WITH_ONE_HEAD = 5
_KEYS_ALONE = (10, 12)  # whose head size by slots is that of keys, though a row holds both
#: The format of vLLM's caches, and those that are measured in several sizes and places.
_FIRST = 1
_SOME = (1, 5, 6, 7)
#: Formats whose calls are counted: tokens outermost, heads outermost, keys next to values.
_COUNTED = (1, 6, 7)


class Ops(NamedTuple):
    """One set of ops."""

    functions: ModuleType
    desc: Callable[[], Any]  # makes a description of caches
    forms: Mapping[int, object]  # formats by number
    methods: tuple[object, object]  # of a load and of a store
    addresses: bool  # caches and objects are handed over as such, else as tensors

    def takes(self, task: Task) -> bool:
        by_slots = task.kernel == "slots"
        lmcache_own = self.functions is not lmcache_ops
        torch_reads_planes = lmcache_own and not self.addresses
        fused = by_slots and torch_reads_planes and task.number in FUSED
        unknown = by_slots and lmcache_own and task.number == _OURS_ALONE
        return task.number in self.forms and not fused and not unknown


def lmcache_steps(bench: IntegrationBench) -> Iterator[Step]:
    """Yield a step for each kind of op, format, memory of the objects, payload and direction.

    A step for each format with counted launches follows.
    """
    own = own_ops(bench)
    addresses = own is not None and own.addresses
    ours = Ops(lmcache_ops, SimpleNamespace, {x: x for x in LAYOUTS}, (0, 1), addresses)
    yield from suite.steps(bench, "lmcache", _planned_cases(bench, own, ours))
    if bench.device.type != "cuda":  # whose kernels torch does not see
        for number in _COUNTED:
            yield f"calls of torch, format {number}", partial(_count, bench, own, ours, number)


def own_ops(bench: IntegrationBench) -> Ops | None:
    """Return LMCache's own ops: compiled ones, or those over torch; None if it is not here."""
    why = []
    for module in _MODULES if bench.device.type == "cuda" else _MODULES[-1:]:
        try:
            return _load(bench, module)
        except (ImportError, PortaKVError) as error:
            why.append(in_a_line(error))
    bench.left_out.append(f"lmcache: its own ops: {'; '.join(why)}")
    return None


def _load(bench: IntegrationBench, module: str) -> Ops:
    compiled = module != _MODULES[-1]
    package = "lmcache"
    functions = load(package, module)[0] if compiled else import_module(f"{package}.{module}")
    types = functions if module == "c_ops" else import_module("lmcache.lmcache_native")
    forms = {int(each): each for each in types.EngineKVFormat.__members__.values()}
    methods = types.TransferDirection.H2D, types.TransferDirection.D2H
    bench.installed[package] = f"{version(package)} {module}"
    return Ops(functions, types.PageBufferShapeDesc, forms, methods, compiled)


class Task(NamedTuple):
    """One call of an op."""

    kernel: str  # by slots, by blocks, or the connector
    number: int  # the format
    narrow: bool  # rows of 64 bytes
    payload: int
    on_host: bool  # the object's memory; else that of the device
    op: str

    def __str__(self) -> str:
        """Return ``slots, narrow rows, 1 MB, object on the host``; the format is another label."""
        rows = ", narrow rows" if self.narrow else ""
        place = "host" if self.on_host else "device"
        return f"{self.kernel}{rows}, {in_words(self.payload)}, object on the {place}"


def _planned_cases(bench: IntegrationBench, own: Ops | None, ours: Ops) -> Iterator[PlannedCase]:
    """Return the cases: those of performance targets come first, since time may run out; then all
    formats, and the other size of some of them; the rest comes late."""
    large, *smaller = bench.sizes.payloads
    several = bench.sizes.formats or _FORMATS
    tasks: dict[Task, bool] = {}
    for payload, on_host, formats, narrow in (
        (large, True, [_FIRST], False),
        (large, True, [_FIRST], True),
        (large, False, [_FIRST], False),
        (large, False, [_FIRST], True),
        (large, True, several, False),
        (large, False, _SOME, False),
        *((small, True, some, False) for small in smaller for some in (_SOME, several)),
    ):
        late = payload != large and formats is several
        for number, op, kernel in product(formats, DIRECTIONS, _KERNELS):
            tasks.setdefault(Task(kernel, number, narrow, payload, on_host, op), late)
    for task, late in tasks.items():
        if _is_called(task, own):
            alongside = task == Task("slots", _FIRST, False, large, True, task.op)
            make = partial(_case, bench, own, ours, task)
            yield PlannedCase(f"{task}, format {task.number}, {task.op}", make, alongside, late)


def _is_called(task: Task, own: Ops | None) -> bool:
    """Return whether LMCache runs such a task: by slots it takes no tuples, and the path of its
    connector is separate code, with chunks on the host."""
    if task.kernel == "connector":
        return own is not None and task.on_host and not task.narrow and task.number in _CONNECTOR
    return task.kernel == "blocks" or task.number not in _TUPLES


def _case(bench: IntegrationBench, own: Ops | None, ours: Ops, task: Task) -> Case:
    looks = _AS_LAYERS.get(task.number, task.number) if task.kernel == "slots" else task.number
    shape = shape_of(looks, bench.sizes.layers, task.payload, task.narrow)
    caches, objects = sides_of(bench, shape, task.number, task.op, task.on_host)
    libraries = {OWN: own, OURS: ours}
    arguments = (task.kernel, task.number, shape, caches, objects)
    call = call_of
    if task.kernel == "connector" and own is not None:  # which looks at LMCache's own formats
        call = path_of
        libraries[OURS] = ours._replace(forms=own.forms)
    makes = {
        name: partial(call, ops, *arguments, task.op)
        for name, ops in libraries.items()
        if ops is not None and ops.takes(task)
    }
    fields = {"shape": str(task), "format": task.number, "kernel": task.kernel}
    fields |= {"narrow": task.narrow, "on_host": task.on_host, "row_bytes": shape.row_bytes}
    fields["aside"] = task.narrow or task.kernel == "connector"
    return suite.case(bench, "lmcache", fields, task.op, caches, objects, makes)


def shape_of(number: int, layers: int, payload: int, narrow: bool = False) -> Shape:
    """Return caches and a transfer of at least so many bytes, whole blocks in one object."""
    kv = 2 if "kv" in LAYOUTS[number].split() else 1
    heads, dim = (1, _NARROW) if narrow else (_HEADS, 2 * _DIM if number in FUSED else _DIM)
    if number in MLA:
        heads = 1
        dim = _LATENT
    text = re.sub("^(kv layer|layer kv) ", "layer ", LAYOUTS[number].replace(" 1 ", " "))
    sized = replace(suite.LIKE, cache=text, layers=layers, kv=kv, heads=heads, dim=dim, pool=4)
    blocks = max(1, -(-payload // replace(sized, tokens=_BLOCK).payload))
    return replace(sized, block_size=_BLOCK, tokens=blocks * _BLOCK)


def sides_of(
    bench: IntegrationBench, shape: Shape, number: int, op: str, on_host: bool, objects: int = 1
) -> tuple[Side, Side]:
    """Return caches, and contiguous objects; the source has bytes that name their places."""
    tensors = shape.layers if shape.layered else 1
    salts = suite.turned(op, 1, None)
    if LAYOUTS[number].startswith(("kv layer", "layer kv")):
        tensors *= 2
    caches = Side.make(bench, shape.cache, shape, number, tensors=tensors, salt=salts[0])
    whole = replace(shape, block_size=shape.tokens // objects, pool=1)
    text = "block kv layer token (head dim)"
    if number == _SIDE_BY_SIDE:
        text = "block layer token (kv dim)"
    return caches, Side.make(bench, text, whole, None, on_host=on_host, salt=salts[1])


def call_of(
    ops: Ops, kernel: str, number: int, shape: Shape, caches: Side, objects: Side, op: str
) -> Call:
    """Return one call; everything that can be made before the call is made here."""
    direction = ops.methods[op == "d2h"]
    if kernel == "slots":
        return _call_by_slots(ops, number, shape, caches, objects, direction)
    return _call_by_blocks(ops, number, shape, caches, objects, direction)


def _cached_tensors(number: int, caches: Side) -> list[torch.Tensor]:
    """Return the caches in the order in which ops take them."""
    tensors = caches.tensors
    if LAYOUTS[number].startswith("kv layer"):  # all keys, then all values
        return [*tensors[::2], *tensors[1::2]]
    return tensors


def _call_by_slots(
    ops: Ops, number: int, shape: Shape, caches: Side, objects: Side, direction: object
) -> Call:
    device = caches.tensors[0].device
    ours = ops.functions is lmcache_ops
    unilateral = number in _UNILATERAL
    tensors = _cached_tensors(number, caches)

    # Compiled ops take addresses, torch ops take tensors in a shape that depends on the format.
    cached: object = tensors
    if ops.addresses:
        cached = suite.addresses(tensors).to(device)
    elif not shape.layered:
        (cached,) = tensors
    elif unilateral or not ours:
        cached = [each.view(_as_torch_reads(shape, ours)) for each in tensors]

    size = 0 if number in MLA and ops.addresses else shape.slots
    memory = objects.tensors[0][0]
    slots = caches.rows.to(device)
    arguments = memory, cached, slots, device, size, direction, ops.forms[number]
    if unilateral:
        return partial(ops.functions.multi_layer_kv_transfer_unilateral, *arguments)
    head = shape.dim // 2 if number in _KEYS_ALONE else shape.dim
    move = ops.functions.multi_layer_kv_transfer
    return partial(move, *arguments, block_size=_BLOCK, head_size=head)


def _description(ops: Ops, shape: Shape) -> Any:
    """Return LMCache's description of caches."""
    desc = ops.desc()
    desc.kv_size = shape.kv
    desc.nl = shape.layers
    desc.nb = shape.blocks
    desc.bs = _BLOCK
    desc.nh = shape.heads
    desc.hs = shape.dim
    desc.element_size = shape.torch_dtype.itemsize
    desc.block_stride_elems = 0
    return desc


def _call_by_blocks(
    ops: Ops, number: int, shape: Shape, caches: Side, objects: Side, direction: object
) -> Call:
    device = caches.tensors[0].device
    desc = _description(ops, shape)

    # Compiled ops take addresses. PortaKV's ops get tensors from LMCache for host memory.
    chunks = [x[0] if len(x) == 1 else x for x in objects.tensors[0].unbind()]
    passed: Any = chunks
    if ops.addresses and not (ops.functions is lmcache_ops and chunks[0].is_cpu):
        passed = [each.data_ptr() for each in chunks]

    tensors = _cached_tensors(number, caches)
    cached: Any
    if number in _TUPLES:
        cached = [*zip(tensors[::2], tensors[1::2], strict=True)]
    elif ops.addresses:
        cached = suite.addresses(tensors).to(device)
    else:
        desc.dtype = shape.torch_dtype
        cached = _as_torch_takes(number, shape, tensors)

    ids = caches.rows[::_BLOCK] // _BLOCK
    blocks: Any = ids.to(device) if ops.addresses else ids.tolist()
    tokens = shape.tokens // len(chunks)
    move = ops.functions.multi_layer_block_kv_transfer
    return partial(
        move, cached, passed, blocks, device, direction, desc, tokens, ops.forms[number], 0
    )


def _as_torch_takes(number: int, shape: Shape, tensors: list[torch.Tensor]) -> object:
    """Return caches as LMCache's torch op by blocks takes them."""
    if number == _WITH_ONE_HEAD:
        tensors = [each.unsqueeze(1) for each in tensors]
    if LAYOUTS[number].startswith("kv layer"):
        halves = [tensors[: shape.layers], tensors[shape.layers :]]
        return halves if shape.layered else halves[0]
    return tensors if shape.layered else tensors[0]


def path_of(
    ops: Ops, kernel: str, number: int, shape: Shape, caches: Side, objects: Side, op: str
) -> Call:
    """Return LMCache's own path from caches to chunks or back, which calls one of these ops.

    The path looks at the caches, and makes tables and descriptions.
    """
    path = import_module(_PATH)
    caches_by_layer = {str(at): each for at, each in enumerate(caches.tensors)}
    ids = (caches.rows[::_BLOCK] // _BLOCK).tolist()
    chunks = list(objects.tensors[0].unbind())
    hints = {"kv_layout": "HND" if "head token" in shape.cache else "NHD"}
    more = {"layout_hints": hints, "engine_kv_format": ops.forms[number]}
    if op == "d2h":
        move = partial(
            path.gather_paged_kv_to_cpu, caches_by_layer, ids, len(ids), out=chunks, **more
        )
    else:
        move = partial(path.scatter_cpu_to_paged_kv, caches_by_layer, ids, chunks, len(ids), **more)
    return partial(_through, path, getattr(ops.functions, _OP), move)


def _through(path: object, function: object, move: Call) -> None:
    """Carry out a move whose module finds its op where this release has it."""
    package = import_module("lmcache")
    places = (path, "resolve_device_ops"), (package, "device_ops"), (package, "c_ops")
    module, name = next(each for each in places if hasattr(*each))
    previous = getattr(module, name)
    ops = _Over(previous, function)
    setattr(module, name, (lambda kind: ops) if module is path else ops)
    try:
        move()
    finally:
        setattr(module, name, previous)


class _Over:
    """Ops of LMCache's with another function in the place of one."""

    def __init__(self, ops: Any, function: Any) -> None:
        self._ops = ops
        setattr(self, _OP, function)

    def __getattr__(self, name: str) -> object:
        return getattr(self._ops, name)


def _as_torch_reads(shape: Shape, ours: bool) -> tuple[int, ...]:
    """Return a layer's shape in which LMCache's torch op by slots reads an address.

    PortaKV's op reads keys and values apart.
    """
    if ours:
        return shape.slots, shape.heads, shape.dim
    if "block kv" in shape.cache:
        return shape.blocks, 2, _BLOCK, -1
    return (2, shape.slots, -1) if "| kv" in shape.cache else (shape.slots, -1)


# --- Calls and waits ------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Counts calls of torch's operators that move or compute something, and those whose results the
    host waits for."""

    _FREE = ("empty", "empty_strided", "set_")
    _WAITING = ("nonzero", "_local_scalar_dense", "unique")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls = 0
        self.waits = 0

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        answer = op(*args, **(kwargs or {}))
        away = any(isinstance(x, torch.Tensor) and not x.is_cpu for x in args)
        here = isinstance(answer, torch.Tensor) and answer.is_cpu
        name = op.overloadpacket.__name__
        self.calls += not (op.is_view or name in self._FREE)
        self.waits += away and (here or name in self._WAITING)
        return answer


def _count(bench: IntegrationBench, own: Ops | None, ours: Ops, number: int) -> Rows:
    """Count a store and a load by blocks with either set of ops, by tensors, after a first call."""
    rows: Rows = []
    shape = replace(shape_of(number, bench.sizes.counted, 0, narrow=True), tokens=32 * _BLOCK)
    for op in DIRECTIONS:
        caches, objects = sides_of(bench, shape, number, op, False, objects=16)
        objects = objects._replace(tensors=[each.cpu() for each in objects.tensors])  # pageable
        sides = suite.Sides(bench, *suite.turned(op, caches, objects))
        before = 0
        for name, ops in {OWN: own, OURS: ours}.items():
            if ops is None:
                continue
            call = call_of(ops, "blocks", number, shape, caches, objects, op)
            right = []
            for counted in (Calls(), Calls()):  # the second sees what is kept from the first
                sides.poison()
                with counted:
                    call()
                right.append(sides.right())
            count = counted.calls + counted.waits
            before = before or count
            fields = {"shape": "16 objects of 2 blocks", "format": number, "calls": counted.calls}
            fewer = {"fewer": short(before / count)} if name == OURS and own else {}
            fields |= {"waits": counted.waits, **fewer, "verified": all(right)}
            rows.append({"kind": "plug_calls", **suite.labels(name, op, "lmcache"), **fields})
    return rows
