# SPDX-License-Identifier: Apache-2.0
"""`portakv warmup`: compile the kernels of `cuda` and `hip` before a transfer needs them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any, NamedTuple

import torch

from portakv.backends.rows_kernel import RowsKernel
from portakv.cli.console import Column, installing, print_json, print_prose, print_table
from portakv.cli.sides import Extents, Side, add_extents, check_cache, make_sides, said_extents
from portakv.errors import PortaKVError
from portakv.plan.plan import CopyPlan
from portakv.runtime import hip as _hip_driver
from portakv.runtime import kernel_cache as _kernel_cache
from portakv.runtime import nvrtc as _nvrtc
from portakv.view.view import KVView

HELP = "compile the kernels of cuda or hip into their cache, for any architecture"
DESCRIPTION = """\
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
    """What kernels are compiled for: ``sm_90`` or ``gfx906``, and by which compiler; whether the
    cache holds the binary of a text, and what makes it and keeps it there."""

    name: str
    compiler: str
    holds: Callable[[str], bool]
    compile: Callable[[str], bytes]


class Pair(NamedTuple):
    """Layouts of a cache and of what is exchanged with it."""

    name: str
    cache: str
    chunk: str
    extents: Extents


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add what the verb takes."""
    parser.add_argument(
        "--arch",
        type=architecture,
        nargs="+",
        metavar="N",
        default=[],
        help="compute capabilities (90, 9.0 or sm_90), or AMD's names, whole, as torch tells them "
        "in gcnArchName (gfx906, gfx90a:sramecc+:xnack-); default: of this machine's devices",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="NAME",
        default=[],
        help="shapes of the benchmarks (default: all of them, unless --layout is given)",
    )
    parser.add_argument(
        "--layout",
        nargs=2,
        action="append",
        metavar=("CACHE", "CHUNK"),
        default=[],
        help="two layout strings or presets; the extents below are theirs",
    )
    add_extents(parser.add_argument_group("extents of --layout"))


def run(asked: argparse.Namespace) -> int:
    """Compile, and print what was compiled and what was there before. Raises `PortaKVError` if a
    compiler or the cache cannot be used, for an unknown shape or architecture, and if there is no
    device and none was named; and what a copy between the layouts would raise."""
    pairs = _shapes(asked.shape) if asked.shape or not asked.layout else []
    compiled_for = targets(asked.arch)
    check_cache("Compiled kernels")
    said = said_extents(asked)
    pairs += [Pair(f"{cache} <-> {chunk}", cache, chunk, said) for cache, chunk in asked.layout]
    began = perf_counter()
    warmed = [done for pair in pairs for done in _warm(pair, compiled_for)]
    seconds = perf_counter() - began
    folder = _kernel_cache.directory()
    compilers = list(dict.fromkeys(target.compiler for target in compiled_for))
    if asked.json:
        print_json(
            {
                "directory": str(folder),
                "compilers": compilers,
                "seconds": round(seconds, 3),
                "warmed": warmed,
            }
        )
        return 0
    columns = [Column("kernels of"), Column("for", whole=True)]
    columns += [Column("compiled", right=True), Column("kept", right=True)]
    print_table(columns, [[str(value) for value in one.values()] for one in warmed])
    compiled, kept = (sum(one[name] for one in warmed) for name in ("compiled", "kept"))
    print()
    print_prose(
        f"Compiled {compiled} kernels by {' and '.join(compilers)} in {seconds:.1f} s; "
        f"{kept} had been compiled before. All are kept in {folder}"
    )
    return 0


def _shapes(names: Sequence[str]) -> list[Pair]:
    """The pairs of some shapes of the benchmarks; without a name, of all."""
    try:
        from portakv_benchmarks.shared.shapes import load
    except ImportError as error:
        raise PortaKVError(
            f"Shapes are read by portakv_benchmarks, which cannot be loaded ({error}); "
            f"{installing('bench')}, or name two layouts with --layout."
        ) from error
    known = load()
    for name in (x for x in names if x not in known):
        has = ", ".join(known)
        raise PortaKVError(f"Shape {name!r} was asked for, but the benchmarks have {has}.")
    pairs = []
    for shape in (known[name] for name in names or known):
        size = shape.block_size
        dim = (shape.dim,)
        extents = Extents(
            shape.layers,
            shape.kv,
            shape.heads,
            dim,
            (size, size),
            tokens=2 * size,
            dtype=shape.torch_dtype,
        )
        pairs.append(Pair(shape.name, shape.cache, shape.chunk, extents))
    return pairs


def _warm(pair: Pair, compiled_for: Sequence[Target]) -> Iterator[dict[str, Any]]:
    """What was compiled for each target; kernels that other pairs share count as kept."""
    sources = list(dict.fromkeys(_sources(pair)))
    for target in compiled_for:
        try:
            missing = [source for source in sources if not target.holds(source)]
            for source in missing:
                target.compile(source)
        except RuntimeError as error:
            raise PortaKVError(str(error)) from error
        kept = len(sources) - len(missing)
        yield {"name": pair.name, "target": target.name, "compiled": len(missing), "kept": kept}


def _sources(pair: Pair) -> Iterator[str]:
    """The text of each kernel that copies of a pair need; it does not depend on the device."""
    layouts = (pair.cache, pair.chunk)
    cpu = torch.device("cpu")
    for by_blocks in (False, True):
        cache, chunk = make_sides(layouts, pair.extents, cpu, (None, None), by_blocks)
        for mine, theirs in product(_arrangements(cache), _arrangements(chunk)):
            ends = [(mine, cache.step), (theirs, chunk.step)]
            for (src, src_step), (dst, dst_step) in (ends, ends[::-1]):
                plan = CopyPlan(src.form, dst.form, src_step, dst_step)
                yield from (RowsKernel(nest, plan).source for nest in plan.nests)


def _arrangements(side: Side) -> list[KVView]:
    """The view, and one whose tensors are slices of one allocation."""
    view = side.view
    tensors = side.view.tensors
    alike = isinstance(tensors, list) and all(isinstance(t, torch.Tensor) for t in tensors)
    if not alike or len({t.shape for t in tensors}) > 1:
        return [view]
    together = list(torch.empty((len(tensors), *tensors[0].shape), dtype=tensors[0].dtype))
    one = KVView(
        together,
        side.layout.text,
        layers=view.layers,
        kv=view.kv,
        heads=view.heads,
        block_size=view.block_size,
        dim=[width // tensors[0].itemsize for width in view.widths],
    )
    return [view, one]


def architecture(text: str) -> Architecture:
    """The architecture that a word of the command line names."""
    if re.fullmatch(r"gfx[0-9a-f]{3,4}(:\w+[+-])*", text):
        return text
    if re.fullmatch(r"(sm_)?\d{2,3}|\d{1,2}\.\d", text):
        return int(text.removeprefix("sm_").replace(".", ""))
    expected = "expected a number such as 90, or gfx906 or the like"
    raise argparse.ArgumentTypeError(f"{text!r} was given, {expected}")


def targets(asked: Sequence[Architecture]) -> list[Target]:
    """A target for each architecture; for those of this machine's devices if none is named."""
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
    if why := _nvrtc.missing():
        raise PortaKVError(f"The kernels of the cuda backend cannot be compiled: {why}.")
    newest = _nvrtc.architectures()[-1]
    # The next generation gets PTX of the newest; what is further away is a slip.
    if capability // 10 > newest // 10 + 1:
        raise PortaKVError(
            f"Expected --arch to be a compute capability such as 90 or {newest}, the newest that "
            f"NVRTC {_nvrtc.nvrtc_version()} knows, got {capability}. Correct it."
        )
    try:
        name = _nvrtc.target_for(capability)
    except RuntimeError as error:
        raise PortaKVError(str(error)) from error
    holds = partial(_nvrtc.compiled_before, capability=capability)
    compile_ = partial(_nvrtc.compile_kernel, capability=capability)
    return Target(name, f"NVRTC {_nvrtc.nvrtc_version()}", holds, compile_)


def _amd(name: str) -> Target:
    try:
        driver = _hip_driver.driver()
        compiler = f"hipRTC {_hip_driver.hiprtc_version(driver)}"
    except (_hip_driver.DriverMissing, RuntimeError) as error:
        why = str(error).rstrip(".")
        raise PortaKVError(f"The kernels of the hip backend cannot be compiled: {why}.") from error
    holds = partial(_hip_driver.compiled_before, driver, architecture=name)
    compile_ = partial(_hip_driver.compile_kernel, driver, architecture=name)
    return Target(name, compiler, holds, compile_)
