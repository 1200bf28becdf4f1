# SPDX-License-Identifier: Apache-2.0
"""The interfaces that integrations call and replace in engines, compared with an installed engine.

The comparison reads the engine's source files and imports none of them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple, TypeAlias


class Interface(NamedTuple):
    """A function, a method, a class or a constant in a module of an engine.

    Attributes:
        module: the dotted name of the module.
        name: the dotted name in the module.
        takes: the first parameters or fields, in order, without ``self``. Further parameters must
            have defaults.
        exact: an integration replaces the function. Further parameters are then allowed only if
            ``may`` lists them, since the engine would pass them.
        may: further parameters that the replacement accepts.
        also: parameters that the integration passes by name.
        abstract: the abstract methods that a class may have, if an integration implements it.
    """

    module: str
    name: str
    takes: tuple[str, ...] = ()
    exact: bool = False
    may: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    abstract: tuple[str, ...] | None = None


_OFFLOAD = "vllm.v1.kv_offload"
_WORKER = "vllm.v1.kv_offload.base"
_SPEC = "vllm.v1.kv_offload.cpu.spec"
_JOB = ("job_id", "src_spec", "dst_spec")
_LMCACHE_OPS = "lmcache.v1.platform.torch_ops.mem_kernels"
_LMCACHE_PAGED_OPS = "lmcache.v1.platform.torch_ops.mp_mem_kernels"
_TOKENS = ("key_value", "key_value_ptrs", "slot_mapping", "paged_memory_device", "page_buffer_size")
_ONE_LAYER = ("key_value", "key_cache", "value_cache", "slot_mapping", "layer_idx")
_POOLS = "sglang.srt.mem_cache.pool_host"
_INDICES = ("device_pool", "host_indices", "device_indices")
_LAYER = "transformers.cache_utils"

Definition: TypeAlias = ast.ClassDef | ast.FunctionDef | ast.Assign | ast.AnnAssign

#: The interfaces that each integration uses, read from the sources of the tested releases.
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
        *(
            Interface(_WORKER, f"OffloadingWorker.{method}", takes, exact=True, may=may)
            for method, takes, may in (
                ("submit_store", _JOB, ()),
                ("submit_load", _JOB, ("expedited",)),
                ("get_finished", (), ()),
                ("wait", ("job_ids",), ()),
                ("shutdown", (), ()),
            )
        ),
        Interface(
            _WORKER,
            "OffloadingWorker",
            abstract=("submit_store", "submit_load", "get_finished", "wait", "shutdown"),
        ),
        Interface(
            _WORKER, "TransferResult", ("job_id", "success", "transfer_size", "transfer_time")
        ),
        Interface(_SPEC, "CPUOffloadingSpec.__init__", ("config",)),
        Interface(_SPEC, "CPUOffloadingSpec.create_worker", ("kv_caches",), True),
        Interface(_SPEC, "CPUOffloadingSpec.get_worker", ("kv_caches",), True),
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
        Interface(_SPEC, "_all_workers_barrier"),
        Interface(_SPEC, "_REGION_SEGMENTS"),
    ),
}


def differences(integration: str) -> list[str]:
    """Return a clause for each interface that the installed engine lacks, or has with other
    parameters.

    The list is empty if all interfaces are as the integration expects.
    """
    return [text for each in INTERFACES[integration] if (text := _difference(each))]


def names_in(module: str, *names: str) -> tuple[str, ...]:
    """Return names of a module as `lacks` takes them."""
    return tuple(f"{module}:{name}" for name in names)


def lacks(names: Iterable[str]) -> list[str]:
    """Return those names that the installed packages do not define.

    ``names``: each the dotted name of a module, a colon, and a dotted name in it.
    """
    absent = list[str]()
    for each in names:
        module, _, name = each.partition(":")
        file = _source(module)
        if file is None or _definition(file, name) is None:
            absent.append(each)
    return absent


def _difference(interface: Interface) -> str:
    """Return a clause that says how an interface differs, or an empty text."""
    place = f"{interface.module}.{interface.name}"
    file = _source(interface.module)
    definition = _definition(file, interface.name) if file else None
    if definition is None:
        return f"{place} is not there"

    if interface.abstract is not None:
        methods = definition.body if isinstance(definition, ast.ClassDef) else []
        further = {
            each.name
            for each in methods
            if isinstance(each, ast.FunctionDef)
            and any("abstract" in ast.unparse(decorator) for decorator in each.decorator_list)
        } - {*interface.abstract}
        if further:
            return f"{place} has further abstract methods: {', '.join(sorted(further))}"
        return ""

    takes, optional = _parts(definition)
    expected = interface.takes
    allowed = {*interface.may} if interface.exact else optional
    same_beginning = takes[: len(expected)] == expected
    rest_is_allowed = {*takes[len(expected) :]} <= allowed
    if same_beginning and rest_is_allowed and {*interface.also} <= {*takes}:
        return ""
    expected = (*expected, *interface.also)
    return f"{place} takes ({', '.join(takes)}) in place of ({', '.join(expected)})"


def _source(module: str) -> Path | None:
    """Return the source file of a module, without importing the package that contains it."""
    package, *rest = module.split(".")
    spec = PathFinder.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        path = Path(folder, *rest)
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _definition(file: Path, name: str) -> Definition | None:
    """Return the definition of a dotted name in a file, or None."""
    try:
        body = ast.parse(file.read_text(encoding="utf-8")).body
    except (OSError, SyntaxError, ValueError):
        return None
    definition: Definition | None = None
    for part in name.split("."):
        definition = next(_named(body, part), None)
        if definition is None:
            return None
        body = [] if isinstance(definition, ast.Assign | ast.AnnAssign) else definition.body
    return definition


def _named(body: list[ast.stmt], name: str) -> Iterator[Definition]:
    """Yield the definitions of a name in a body, the last definition first."""
    for each in reversed(body):
        if isinstance(each, ast.ClassDef | ast.FunctionDef) and each.name == name:
            yield each
        if isinstance(each, ast.Assign) and name in [ast.unparse(x) for x in each.targets]:
            yield each
        if isinstance(each, ast.AnnAssign) and ast.unparse(each.target) == name:
            yield each


def _parts(definition: Definition) -> tuple[tuple[str, ...], set[str]]:
    """Return the names of all parameters or fields, and of those with a default.

    A constant has neither.
    """
    defaults: dict[str, object] = {}  # by name; None: the parameter or field has none
    if isinstance(definition, ast.ClassDef):
        for each in definition.body:
            if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name):
                defaults[each.target.id] = each.value
    elif isinstance(definition, ast.FunctionDef):
        given = definition.args
        names = [each.arg for each in (*given.posonlyargs, *given.args)]
        without = [None] * (len(names) - len(given.defaults))
        defaults = dict(zip(names, [*without, *given.defaults], strict=True))
        for keyword, default in zip(given.kwonlyargs, given.kw_defaults, strict=True):
            defaults[keyword.arg] = default
        if names[:1] in (["self"], ["cls"]):
            del defaults[names[0]]
    return tuple(defaults), {name for name, default in defaults.items() if default is not None}
