# SPDX-License-Identifier: Apache-2.0
"""`portakv warmup`: compile the row kernels of `cuda` and `hip` before a transfer needs them."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from time import perf_counter
from typing import Any, NamedTuple

import torch

from portakv.backends.rows_kernel import kernels_of
from portakv.cli.console import Report, print_json, print_prose, print_rows
from portakv.cli.sides import (
    Extents,
    Side,
    add_extents,
    check_cache,
    extents_of,
    load_shapes,
    make_sides,
)
from portakv.errors import PortaKVError
from portakv.plan.plan import CopyPlan
from portakv.runtime import cuda, hip, kernel_cache
from portakv.view.view import KVView

HELP = "compile the row kernels of cuda or hip into their cache, for any architecture"
DESCRIPTION = """\
Compiles the row kernels of the `cuda` or the `hip` backend and stores them in
their cache (PORTAKV_CACHE_DIR, else portakv in the user's cache folder). The
first transfer of raw rows then compiles nothing. The command needs no GPU: with
--arch it compiles for another machine that has the same release of the compiler.
For each shape or pair of layouts it compiles the kernels of gather and scatter,
by slots and by blocks, for layers in separate allocations and in one. Kernels for
other extents of an engine are compiled when the engine registers its caches."""

#: A compute capability times ten, or AMD's name of an architecture.
Architecture = int | str


class Target(NamedTuple):
    """An architecture that kernels are compiled for."""

    name: str  # ``sm_90`` or ``gfx906``
    compiler: str
    holds: Callable[[str], bool]  # whether the cache has the binary of a source text
    compile: Callable[[str], bytes]  # compiles a source text and stores the binary in the cache


class Pair(NamedTuple):
    """The layouts of a cache and of the chunk that is exchanged with it."""

    name: str
    cache: str
    chunk: str
    extents: Extents


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options."""
    parser.add_argument(
        "--arch",
        type=architecture,
        nargs="+",
        metavar="N",
        default=[],
        help="compute capabilities (90, 9.0 or sm_90), or AMD's full names, as in torch's "
        "gcnArchName (gfx906, gfx90a:sramecc+:xnack-); default: this machine's devices",
    )
    parser.add_argument(
        "--shape",
        nargs="+",
        metavar="NAME",
        default=[],
        help="shapes of real models, those of `portakv bench` (default: all of them, unless "
        "--layout is used)",
    )
    parser.add_argument(
        "--layout",
        nargs=2,
        action="append",
        metavar=("CACHE", "CHUNK"),
        default=[],
        help="two layout strings or presets; the extents below apply to them",
    )
    add_extents(parser.add_argument_group("extents of --layout"))


def run(args: argparse.Namespace) -> int:
    """Compile, and print the numbers of kernels that were compiled and that were cached before.

    Raises:
        PortaKVError: a compiler or the cache cannot be used, a shape or architecture is unknown, or
            there is no device and the command names none. Errors that a copy between the layouts
            would raise are raised too.
    """
    pairs = _shapes(args.shape) if args.shape or not args.layout else []
    compiled_for = targets(args.arch)
    check_cache("Compiled kernels")
    extents = extents_of(args)
    pairs += [Pair(f"{cache} <-> {chunk}", cache, chunk, extents) for cache, chunk in args.layout]
    began = perf_counter()
    warmed = [done for pair in pairs for done in _warm(pair, compiled_for)]
    seconds = perf_counter() - began
    folder = kernel_cache.directory()
    compilers = list(dict.fromkeys(target.compiler for target in compiled_for))
    if args.json:
        print_json(
            {
                "directory": str(folder),
                "compilers": compilers,
                "seconds": round(seconds, 3),
                "warmed": warmed,
            }
        )
        return 0
    numbers = ["compiled", "cached"]
    titles = ["kernels of", "for", *numbers]
    print_rows(
        titles,
        [[str(value) for value in one.values()] for one in warmed],
        prose=["kernels of", *numbers],
        right=numbers,
    )
    compiled = sum(one["compiled"] for one in warmed)
    cached = sum(one["kept"] for one in warmed)
    print()
    print_prose(
        f"Compiled {compiled} kernels by {' and '.join(compilers)} in {seconds:.1f} s; "
        f"{cached} were cached before. All are stored in {folder}"
    )
    return 0


def _shapes(names: Sequence[str]) -> list[Pair]:
    """Return the pairs of named shapes of real models; of all shapes without a name."""
    known = load_shapes()
    for name in (x for x in names if x not in known):
        has = ", ".join(known)
        raise PortaKVError(f"Expected a shape of a model, got {name!r}. Name one of {has}.")
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


def _warm(pair: Pair, compiled_for: Sequence[Target]) -> Iterator[Report]:
    """Yield the numbers of kernels for each target; kernels of an earlier pair count as cached."""
    sources = list(dict.fromkeys(_sources(pair)))
    for target in compiled_for:
        try:
            missing = [source for source in sources if not target.holds(source)]
            for source in missing:
                target.compile(source)
        except RuntimeError as error:
            raise PortaKVError(str(error)) from error
        cached = len(sources) - len(missing)
        yield {"name": pair.name, "target": target.name, "compiled": len(missing), "kept": cached}


def _sources(pair: Pair) -> Iterator[str]:
    """Yield the source of each kernel that a pair's copies need; it is the same for all devices."""
    layouts = (pair.cache, pair.chunk)
    cpu = torch.device("cpu")
    for by_blocks in (False, True):
        cache, chunk = make_sides(layouts, pair.extents, cpu, (None, None), by_blocks)
        for pages, rows in product(_arrangements(cache), _arrangements(chunk)):
            ends = [(pages, cache.step), (rows, chunk.step)]
            for (src, src_step), (dst, dst_step) in (ends, ends[::-1]):
                plan = CopyPlan(src.form, dst.form, src_step, dst_step)
                yield from (kernel.source for kernel in kernels_of(plan))


def _arrangements(side: Side) -> list[KVView]:
    """Return the view, and a copy of it whose tensors are slices of one allocation."""
    view = side.view
    tensors: Any = side.view.tensors
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
    """Return the architecture that a word of the command line names."""
    if re.fullmatch(r"gfx[0-9a-f]{3,4}(:\w+[+-])*", text):
        return text
    if re.fullmatch(r"(sm_)?\d{2,3}|\d{1,2}\.\d", text):
        return int(text.removeprefix("sm_").replace(".", ""))
    expected = "expected a number such as 90, or a name such as gfx906"
    raise argparse.ArgumentTypeError(f"{expected}, got {text!r}")


def targets(requested: Sequence[Architecture]) -> list[Target]:
    """Return a target for each architecture; by default for those of this machine's devices."""
    architectures = list(dict.fromkeys(requested or _own()))
    if not architectures:
        raise PortaKVError(
            "Expected a CUDA device to compile kernels for, but torch finds none here. Name "
            "architectures, for example --arch 90, or --arch gfx906."
        )
    return [_amd(one) if isinstance(one, str) else _nvidia(one) for one in architectures]


def _own() -> Iterator[Architecture]:
    for number in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        if torch.version.hip is None:
            major, minor = torch.cuda.get_device_capability(number)
            yield 10 * major + minor
        else:
            yield torch.cuda.get_device_properties(number).gcnArchName


def _nvidia(capability: int) -> Target:
    if why := cuda.no_nvrtc():
        raise PortaKVError(f"The kernels of the cuda backend cannot be compiled: {why}.")
    newest = cuda.architectures()[-1]
    # The next generation gets PTX of the newest one; a number further away is a typing error.
    if capability // 10 > newest // 10 + 1:
        raise PortaKVError(
            f"Expected --arch to be a compute capability such as 90 or {newest}, the newest that "
            f"NVRTC {cuda.nvrtc_version()} knows, got {capability}. Correct it."
        )
    try:
        name = cuda.target_for(capability)
    except RuntimeError as error:
        raise PortaKVError(str(error)) from error
    holds = partial(cuda.compiled_before, capability=capability)
    compile_ = partial(cuda.compile_kernel, capability=capability)
    return Target(name, f"NVRTC {cuda.nvrtc_version()}", holds, compile_)


def _amd(name: str) -> Target:
    try:
        driver = hip.driver()
        compiler = f"hipRTC {hip.hiprtc_version(driver)}"
    except (hip.DriverMissing, RuntimeError) as error:
        why = str(error).rstrip(".")
        raise PortaKVError(f"The kernels of the hip backend cannot be compiled: {why}.") from error
    holds = partial(hip.compiled_before, driver, architecture=name)
    compile_ = partial(hip.compile_kernel, driver, architecture=name)
    return Target(name, compiler, holds, compile_)
