# SPDX-License-Identifier: Apache-2.0
"""`portakv warmup`: compile the kernels of `cuda` and `hip` before a transfer needs them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from time import perf_counter
from typing import Any, NamedTuple

import torch

from portakv.backends.rows_kernel import RowsKernel
from portakv.cli.console import Column, print_json, print_prose, print_table
from portakv.cli.explain import add_extents, said_extents
from portakv.cli.sides import Extents, Side, make_sides
from portakv.errors import PortaKVError
from portakv.plan.plan import CopyPlan
from portakv.runtime import hip as _hip_driver
from portakv.runtime import kernel_cache as _kernel_cache
from portakv.runtime import nvrtc as _nvrtc
from portakv.view.view import KVView

_DESCRIPTION = """\
Compiles the kernels of the `cuda` or the `hip` backend and keeps them in their
cache (PORTAKV_CACHE_DIR, else portakv in the user's cache folder), so that the
first transfer does not have to. It needs no GPU: with --arch it also serves a
machine that is not here but has the same release of the compiler. For each
shape or pair of layouts the kernels of gather and scatter are made, by slots
and by blocks, for layers in separate allocations and in one. What an engine's
own extents need beyond that is compiled when its caches are registered."""

#: A compute capability times ten, or what AMD's compiler calls an architecture.
Architecture = int | str


class Target(NamedTuple):
    """What kernels are compiled for.

    Attributes:
        name: ``sm_90``, ``gfx906``.
        compiler: its name and version.
        holds: whether the cache has the binary of a text; compile: makes it and keeps it there.
    """

    name: str
    compiler: str
    holds: Callable[[str], bool]
    compile: Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class Pair:
    """A cache and what is exchanged with it."""

    name: str
    cache: str
    chunk: str
    extents: Extents


@dataclass(frozen=True, slots=True)
class Warmed:
    """The kernels of one pair for one target; those that other pairs share count as kept."""

    name: str
    target: str
    compiled: int
    kept: int


def add_to(verbs: Any) -> None:
    """Add the verb."""
    parser = verbs.add_parser(
        "warmup",
        help="compile the kernels of cuda or hip into their cache, for any architecture",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arch", type=architecture, nargs="+", metavar="N", default=[],
        help="compute capabilities (90, 9.0 or sm_90), or AMD's names, whole, as torch tells them "
        "in gcnArchName (gfx906, gfx90a:sramecc+:xnack-); default: of this machine's devices",
    )  # fmt: skip
    parser.add_argument(
        "--shape", nargs="+", metavar="NAME", default=[],
        help="shapes of the benchmarks (default: all of them, unless --layout is given)",
    )  # fmt: skip
    parser.add_argument(
        "--layout", nargs=2, action="append", metavar=("CACHE", "CHUNK"), default=[],
        help="two layout strings or presets; the extents below are theirs",
    )  # fmt: skip
    add_extents(parser.add_argument_group("extents of --layout"))
    parser.add_argument("--json", action="store_true", help="print one JSON value")
    parser.set_defaults(run=run)


def run(asked: argparse.Namespace) -> int:
    """Compile, and print what was compiled and what was there before.

    Raises:
        PortaKVError: a compiler or the cache cannot be used, an unknown shape or architecture, no
            device where none was named.
        LayoutError, Unsupported: what a copy between the layouts would raise.
    """
    compiled_for = targets(asked.arch)
    why = _kernel_cache.refusal()
    if why is not None:
        raise PortaKVError(
            f"Compiled kernels cannot be kept: {why}. Set {_kernel_cache.ENVIRONMENT} to a folder "
            f"that only you can write to."
        )
    pairs = [*_shapes(asked.shape, not asked.layout), *_layouts(asked)]
    began = perf_counter()
    warmed = [done for pair in pairs for done in _warm(pair, compiled_for)]
    seconds = perf_counter() - began
    compilers = list(dict.fromkeys(target.compiler for target in compiled_for))
    if asked.json:
        print_json(_as_json(warmed, compilers, seconds))
    else:
        _print(warmed, compilers, seconds)
    return 0


def _shapes(names: Sequence[str], else_all: bool) -> list[Pair]:
    if not names and not else_all:
        return []
    try:
        from portakv_benchmarks.shared.shapes import load
    except ImportError as error:
        raise PortaKVError(
            f"Shapes are read by portakv_benchmarks, which cannot be loaded ({error}); "
            f"`pip install 'portakv[bench]'`, or name two layouts with --layout."
        ) from error
    known = load()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise PortaKVError(
            f"Shape {unknown[0]!r} was asked for, but the benchmarks have {', '.join(known)}."
        )
    return [
        Pair(
            shape.name, shape.cache, shape.chunk,
            Extents(
                shape.layers, shape.kv, shape.heads, (shape.dim,), (shape.block_size,) * 2,
                tokens=2 * shape.block_size, dtype=shape.torch_dtype,
            ),
        )
        for shape in (known[name] for name in names or known)
    ]  # fmt: skip


def _layouts(asked: argparse.Namespace) -> list[Pair]:
    return [
        Pair(f"{cache} <-> {chunk}", cache, chunk, said_extents(asked))
        for cache, chunk in asked.layout
    ]


def _warm(pair: Pair, compiled_for: Sequence[Target]) -> Iterator[Warmed]:
    sources = list(dict.fromkeys(_sources(pair)))
    for target in compiled_for:
        try:
            missing = [source for source in sources if not target.holds(source)]
            for source in missing:
                target.compile(source)
        except RuntimeError as error:
            raise PortaKVError(str(error)) from error
        yield Warmed(pair.name, target.name, len(missing), len(sources) - len(missing))


def _sources(pair: Pair) -> Iterator[str]:
    """The text of each kernel that copies of a pair need; it does not depend on the device."""
    for by_blocks in (False, True):
        cache, chunk = make_sides(
            (pair.cache, pair.chunk), pair.extents, torch.device("cpu"), (None, None), by_blocks
        )
        for mine in _arrangements(cache):
            for theirs in _arrangements(chunk):
                ends = [(mine, cache.step), (theirs, chunk.step)]
                for (src, src_step), (dst, dst_step) in (ends, ends[::-1]):
                    plan = CopyPlan(src.form, dst.form, src_step, dst_step)
                    yield from (RowsKernel(nest, plan).source for nest in plan.nests)


def _arrangements(side: Side) -> list[KVView]:
    """The view, and one whose tensors are slices of one allocation."""
    view = side.view
    tensors = view.tensors
    if not isinstance(tensors, list) or not all(isinstance(t, torch.Tensor) for t in tensors):
        return [view]
    if len({t.shape for t in tensors}) > 1:
        return [view]
    together = list(torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype))
    one = KVView(
        together, side.layout.text, layers=view.layers, kv=view.kv, heads=view.heads,
        block_size=view.block_size, dim=[width // tensors[0].itemsize for width in view.widths],
    )  # fmt: skip
    return [view, one]


def _print(warmed: Sequence[Warmed], compilers: Sequence[str], seconds: float) -> None:
    columns = [
        Column("kernels of"), Column("for", whole=True), Column("compiled", right=True),
        Column("kept", right=True),
    ]  # fmt: skip
    rows = [[one.name, one.target, str(one.compiled), str(one.kept)] for one in warmed]
    print_table(columns, rows)
    compiled, kept = sum(one.compiled for one in warmed), sum(one.kept for one in warmed)
    print()
    print_prose(
        f"{compiled} kernels compiled by {' and '.join(compilers)} in {seconds:.1f} s, "
        f"{kept} were there before: {_kernel_cache.directory()}"
    )


def _as_json(warmed: Sequence[Warmed], compilers: Sequence[str], seconds: float) -> dict[str, Any]:
    return {
        "directory": str(_kernel_cache.directory()),
        "compilers": [*compilers],
        "seconds": round(seconds, 3),
        "warmed": [asdict(one) for one in warmed],
    }


def architecture(text: str) -> Architecture:
    """The architecture that a word of the command line names."""
    if re.fullmatch(r"gfx[0-9a-f]{3,4}(:\w+[+-])*", text):
        return text
    if re.fullmatch(r"(sm_)?\d{2,3}|\d{1,2}\.\d", text) is None:
        raise argparse.ArgumentTypeError(
            f"{text!r} was given, expected a number such as 90, or gfx906 or the like"
        )
    return int(text.removeprefix("sm_").replace(".", ""))


def targets(asked: Sequence[Architecture]) -> list[Target]:
    """A target for each architecture; for those of this machine's devices where none is named.

    Raises:
        PortaKVError: a compiler cannot be used, an architecture that it does not know, no device.
    """
    found = list(dict.fromkeys(asked or _own()))
    if not found:
        raise PortaKVError(
            "Kernels were asked for this machine's own devices, but torch finds no CUDA device "
            "here; name architectures, for example --arch 90, or --arch gfx906."
        )
    return [_amd(one) if isinstance(one, str) else _nvidia(one) for one in found]


def _own() -> Iterator[Architecture]:
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(number)
            yield 10 * major + minor
        else:
            yield torch.cuda.get_device_properties(number).gcnArchName


def _nvidia(capability: int) -> Target:
    why = _nvrtc.missing()
    if why is not None:
        raise PortaKVError(f"The kernels of the cuda backend cannot be compiled: {why}.")
    try:
        name = _nvrtc.target_for(capability)
    except RuntimeError as error:
        raise PortaKVError(str(error)) from error
    return Target(
        name,
        f"NVRTC {_nvrtc.nvrtc_version()}",
        partial(_nvrtc.compiled_before, capability=capability),
        partial(_nvrtc.compile_kernel, capability=capability),
    )


def _amd(name: str) -> Target:
    try:
        driver = _hip_driver.driver()
        compiler = f"hipRTC {_hip_driver.hiprtc_version(driver)}"
    except (_hip_driver.DriverMissing, RuntimeError) as error:
        why = str(error).rstrip(".")
        raise PortaKVError(f"The kernels of the hip backend cannot be compiled: {why}.") from error
    return Target(
        name,
        compiler,
        partial(_hip_driver.compiled_before, driver, architecture=name),
        partial(_hip_driver.compile_kernel, driver, architecture=name),
    )
