# SPDX-License-Identifier: Apache-2.0
"""What plugs call and replace in engines, and whether an installed engine still has it. The source
files of the engine are read; nothing of it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple, TypeAlias


class Interface(NamedTuple):
    """A function, a method, a class or a constant in a module of an engine.

    Attributes:
        takes: the first parameters or fields, in order, without ``self``. Further ones must have
            defaults.
        exact: a plug replaces it, so that there may be no further ones but ``may``: the engine
            would pass them.
        may: the further ones that the plug's own knows.
        also: parameters that the plug passes by name.
        abstract: of a class that a plug implements, the abstract methods that it may have.
    """

    module: str
    name: str
    takes: tuple[str, ...] = ()
    exact: bool = False
    may: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    abstract: tuple[str, ...] | None = None


_OFFLOAD = "vllm.v1.kv_offload"
_LMCACHE_OPS = "lmcache.v1.platform.torch_ops.mem_kernels"
_LMCACHE_PAGED_OPS = "lmcache.v1.platform.torch_ops.mp_mem_kernels"
_TOKENS = ("key_value", "key_value_ptrs", "slot_mapping", "paged_memory_device", "page_buffer_size")
_ONE_LAYER = ("key_value", "key_cache", "value_cache", "slot_mapping", "layer_idx")
_POOLS = "sglang.srt.mem_cache.pool_host"
_INDICES = ("device_pool", "host_indices", "device_indices")
_LAYER = "transformers.cache_utils"

Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.Assign

#: For each plug what it uses; read from the releases that it was run beside.
INTERFACES = {
    "lmcache": (
        Interface("lmcache.v1.platform.base.device_spec", "DeviceSpec.device_type"),
        Interface("lmcache.v1.platform.base.device_spec", "DeviceSpec.ops_cls"),
        Interface(
            _LMCACHE_OPS,
            "multi_layer_kv_transfer",
            (
                *_TOKENS,
                "direction",
                "engine_kv_format",
                "block_size",
                "head_size",
                "skip_prefix_n_tokens",
                "block_stride_elems",
            ),
            exact=True,
        ),
        Interface(
            _LMCACHE_OPS,
            "single_layer_kv_transfer",
            (
                "lmc_key_value_cache",
                "vllm_key_value_cache",
                "slot_mapping",
                "direction",
                "engine_kv_format",
                "token_major",
            ),
            exact=True,
        ),
        Interface(_LMCACHE_OPS, "load_and_reshape_flash", _ONE_LAYER, exact=True),
        Interface(_LMCACHE_OPS, "reshape_and_cache_back_flash", _ONE_LAYER, exact=True),
        Interface(
            _LMCACHE_PAGED_OPS,
            "multi_layer_block_kv_transfer",
            (
                "paged_buffer_ptrs_tensor",
                "lmcache_objects_ptrs",
                "block_ids",
                "device",
                "direction",
                "shape_desc",
                "lmcache_chunk_size",
                "engine_kv_format",
                "skip_prefix_n_blocks",
            ),
            exact=True,
        ),
    ),
    "sglang": (
        Interface(
            "sglang.srt.plugins.hook_registry",
            "HookRegistry.register",
            ("target", "hook", "hook_type"),
        ),
        *(
            Interface(module, f"{pool}.{method}", takes, exact=True)
            for module, pool in (
                (f"{_POOLS}.mha", "MHATokenToKVPoolHost"),
                (f"{_POOLS}.mha", "AsymmetricMHATokenToKVPoolHost"),
                (f"{_POOLS}.mla", "MLATokenToKVPoolHost"),
            )
            for method, takes in (
                ("load_to_device_per_layer", (*_INDICES, "layer_id", "io_backend", "is_draft")),
                ("backup_from_device_all_layer", (*_INDICES, "io_backend")),
            )
        ),
        Interface(f"{_POOLS}.base", "HostKVCache.destroy"),
    ),
    "transformers": (
        Interface(_LAYER, "DynamicLayer.update", ("key_states", "value_states")),
        Interface(_LAYER, "DynamicLayer.crop", ("tokens_to_remove",), exact=True),
        Interface(_LAYER, "DynamicLayer.get_seq_length", exact=True),
        Interface(_LAYER, "DynamicCache.__init__", ("ddp_cache_data", "config")),
    ),
    "vllm": (
        Interface(
            f"{_OFFLOAD}.base",
            "OffloadingWorker.submit_store",
            ("job_id", "src_spec", "dst_spec"),
            exact=True,
        ),
        Interface(
            f"{_OFFLOAD}.base",
            "OffloadingWorker.submit_load",
            ("job_id", "src_spec", "dst_spec"),
            exact=True,
            may=("expedited",),
        ),
        Interface(
            f"{_OFFLOAD}.base",
            "OffloadingWorker",
            abstract=("submit_store", "submit_load", "get_finished", "wait", "shutdown"),
        ),
        Interface(f"{_OFFLOAD}.base", "OffloadingWorker.get_finished", exact=True),
        Interface(f"{_OFFLOAD}.base", "OffloadingWorker.wait", ("job_ids",), exact=True),
        Interface(f"{_OFFLOAD}.base", "OffloadingWorker.shutdown", exact=True),
        Interface(
            f"{_OFFLOAD}.base",
            "TransferResult",
            ("job_id", "success", "transfer_size", "transfer_time"),
        ),
        Interface(f"{_OFFLOAD}.cpu.spec", "CPUOffloadingSpec.__init__", ("config",)),
        Interface(f"{_OFFLOAD}.cpu.spec", "CPUOffloadingSpec.create_worker", ("kv_caches",), True),
        Interface(f"{_OFFLOAD}.cpu.spec", "CPUOffloadingSpec.get_worker", ("kv_caches",), True),
        Interface(
            f"{_OFFLOAD}.cpu.shared_offload_region",
            "SharedOffloadRegion.__init__",
            (
                "engine_id",
                "num_chunks",
                "rank",
                "kv_bytes_per_chunk",
                "cpu_page_size",
                "barrier",
            ),
            also=("populate_shard", "num_segments"),
        ),
        Interface(f"{_OFFLOAD}.cpu.gpu_worker", "pin_mmap_region", ("region", "worker_slot_only")),
        Interface(f"{_OFFLOAD}.cpu.spec", "_all_workers_barrier"),
        Interface(f"{_OFFLOAD}.cpu.spec", "_REGION_SEGMENTS"),
    ),
}


def differences(plug: str) -> list[str]:
    """Return a clause for each interface of a plug that the installed engine lacks or has with
    other parameters; nothing if all are as the plug expects."""
    return [text for each in INTERFACES[plug] if (text := _difference(each))]


def _difference(interface: Interface) -> str:
    """Return how an interface differs; empty if it does not."""
    place = f"{interface.module}.{interface.name}"
    file = _source(interface.module)
    found = _definition(file, interface.name) if file else None
    if found is None:
        return f"{place} is not there"
    if interface.abstract is not None:
        further = _abstract(found) - {*interface.abstract}
        return f"{place} has further abstract methods: {', '.join(sorted(further))}" * bool(further)
    takes, optional = _parts(found)
    expected = interface.takes
    allowed = {*interface.may} if interface.exact else optional
    fits = {*takes[len(expected) :]} <= allowed and {*interface.also} <= {*takes}
    if takes[: len(expected)] == expected and fits:
        return ""
    expected = (*expected, *interface.also)
    return f"{place} takes ({', '.join(takes)}) in place of ({', '.join(expected)})"


def _source(module: str) -> Path | None:
    """Return the source file of a module, without an import of the package that it lies in."""
    package, *rest = module.split(".")
    spec = PathFinder.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _definition(file: Path, name: str) -> Definition | None:
    """Return what defines a dotted name in a file."""
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return None
    found: Definition | None = None
    for part in name.split("."):
        found = next(_named(body, part), None)
        if found is None:
            return None
        body = [] if isinstance(found, ast.Assign) else found.body
    return found


def _named(body: list[ast.stmt], name: str) -> Iterator[Definition]:
    """Yield what defines a name in a body, the last one first."""
    for each in reversed(body):
        if isinstance(each, ast.ClassDef | ast.FunctionDef) and each.name == name:
            yield each
        if isinstance(each, ast.Assign) and name in [ast.unparse(x) for x in each.targets]:
            yield each


def _abstract(found: Definition) -> set[str]:
    """Return the names of the abstract methods of a class."""
    methods = found.body if isinstance(found, ast.ClassDef) else []
    return {
        each.name
        for each in methods
        if isinstance(each, ast.FunctionDef)
        and any("abstract" in ast.unparse(decorator) for decorator in each.decorator_list)
    }


def _parts(found: Definition) -> tuple[tuple[str, ...], set[str]]:
    """Return the names of parameters or fields, and those with a default; none of a constant."""
    if isinstance(found, ast.ClassDef):
        return _fields(found)
    return _parameters(found) if isinstance(found, ast.FunctionDef) else ((), set())


def _parameters(function: ast.FunctionDef) -> tuple[tuple[str, ...], set[str]]:
    """Return the names of a function's parameters without ``self``, and those with a default."""
    arguments = function.args
    positional = [each.arg for each in (*arguments.posonlyargs, *arguments.args)]
    optional = {*positional[len(positional) - len(arguments.defaults) :]} - {"self", "cls"}
    if not arguments.defaults:
        optional = set()
    if positional[:1] in (["self"], ["cls"]):
        del positional[0]
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        positional.append(each.arg)
        if default is not None:
            optional.add(each.arg)
    return tuple(positional), optional


def _fields(fields: ast.ClassDef) -> tuple[tuple[str, ...], set[str]]:
    """Return the names of a class's annotated fields, and those with a default."""
    found = [each for each in fields.body if isinstance(each, ast.AnnAssign)]
    names = [each.target.id for each in found if isinstance(each.target, ast.Name)]
    optional = {
        each.target.id
        for each in found
        if isinstance(each.target, ast.Name) and each.value is not None
    }
    return tuple(names), optional
