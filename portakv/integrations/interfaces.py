# SPDX-License-Identifier: Apache-2.0
"""What plugs call and replace in engines, and whether an installed engine still has it. The source
files of the engine are read; nothing of it is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple


class Interface(NamedTuple):
    """A function, a method or a class of fields in a module of an engine.

    ``takes``: its first parameters or fields, in order, without ``self``; any further ones must
    have defaults, or there must be none if ``exact``, as for a method that a plug replaces: the
    engine would pass them.
    """

    module: str
    name: str
    takes: tuple[str, ...] = ()
    exact: bool = False


_OFFLOAD = "vllm.v1.kv_offload"
_LMCACHE_OPS = "lmcache.v1.platform.torch_ops.mem_kernels"
_LMCACHE_PAGED_OPS = "lmcache.v1.platform.torch_ops.mp_mem_kernels"
_TOKENS = ("key_value", "key_value_ptrs", "slot_mapping", "paged_memory_device", "page_buffer_size")
_ONE_LAYER = ("key_value", "key_cache", "value_cache", "slot_mapping", "layer_idx")
_POOLS = "sglang.srt.mem_cache.pool_host"
_INDICES = ("device_pool", "host_indices", "device_indices")
_LAYER = "transformers.cache_utils"

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
            f"{_OFFLOAD}.base", "OffloadingWorker.submit_load", ("job_id", "src_spec", "dst_spec")
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
    takes, optional = _fields(found) if isinstance(found, ast.ClassDef) else _parameters(found)
    expected = interface.takes
    further = takes[len(expected) :]
    fits = not further or (not interface.exact and {*further} <= optional)
    if takes[: len(expected)] == expected and fits:
        return ""
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


def _definition(file: Path, name: str) -> ast.ClassDef | ast.FunctionDef | None:
    """Return the class or function of a dotted name in a file."""
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return None
    found = None
    for part in name.split("."):
        found = next((each for each in _named(body) if each.name == part), None)
        if found is None:
            return None
        body = found.body
    return found


def _named(body: list[ast.stmt]) -> Iterator[ast.ClassDef | ast.FunctionDef]:
    """Yield the classes and functions of a body, the last one of a name first."""
    for each in reversed(body):
        if isinstance(each, ast.ClassDef | ast.FunctionDef):
            yield each


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
