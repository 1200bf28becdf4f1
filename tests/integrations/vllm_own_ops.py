# SPDX-License-Identifier: Apache-2.0
"""A pytest plugin for vLLM's own tests of its ops: PortaKV's stand for those of its C library.

    SIMDEV_NAME=simdev python -m pytest --noconftest -p vllm_own_ops \
        tests/kernels/attention/test_cache.py

`vllm._custom_ops` calls them through torch's registry, where they replace what vLLM compiled. What
the tests request of ``cuda`` goes to the device that the variable names; on a CUDA device without
the variable nothing else is changed. It prints at the end how often each op was called.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from math import prod
from typing import Any

import pytest
import torch
from sglang_own_tests import InPlaceOfCuda

from portakv.integrations import vllm_ops
from portakv_conformance import simdev

NAME = "cuda" if torch.cuda.is_available() else os.environ.get("SIMDEV_NAME", "cpu")
SIMULATED = {NAME} - {"cpu", "cuda"}
#: What each op writes; those that take addresses write no tensor that they are handed.
WRITTEN = {
    "concat_and_cache_mla": ("kv_cache",),
    "concat_and_cache_mla_grouped": (),
    "cp_gather_cache": ("dst",),
    "gather_and_maybe_dequant_cache": ("dst",),
    "reshape_and_cache": ("key_cache", "value_cache"),
    "reshape_and_cache_flash": ("key_cache", "value_cache"),
    "swap_blocks": ("dst",),
    "swap_blocks_batch": (),
}
#: The values that the integration serves: it converts no rows, and Triton's kernels are vLLM's own.
TAKEN = {"kv_cache_dtype": ("auto",), "implementation": ("cuda",)}
SIZES = "num_blocks", "block_size", "head_size"
#: Blocks x their tokens x dim of a head: larger pools take a CPU minutes, and a GPU many GiB.
MOST = 1 << (23 if NAME == "cuda" else 19)
SPACE = "_C_cache_ops"  # of torch.ops, where vLLM calls them
_library = torch.library.Library(SPACE, "FRAGMENT")
_calls: Counter[str] = Counter()


def swap_blocks_batch(
    src_ptrs: torch.Tensor,
    dst_ptrs: torch.Tensor,
    sizes: torch.Tensor,
    is_src_access_order_any: bool = False,
) -> None:
    """Take only vLLM's arguments; its tests hand over addresses of the device."""
    device = NAME if NAME in SIMULATED else None
    vllm_ops.swap_blocks_batch(
        src_ptrs, dst_ptrs, sizes, is_src_access_order_any, src_device=device, dst_device=device
    )


def pytest_configure() -> None:
    """Register the ops before a test module looks for them."""
    from vllm import _custom_ops  # noqa: F401  # which loads those that vLLM compiled, if any
    from vllm.platforms import current_platform

    for name, written in WRITTEN.items():
        op = globals().get(name, getattr(vllm_ops, name))
        key = "CPU" if name == "swap_blocks_batch" else "CUDA"  # its addresses lie on the host
        if not hasattr(getattr(torch.ops, SPACE), name):
            schema = torch.library.infer_schema(op, mutates_args=written)
            _library.define(name + schema)
            torch.library.register_fake(f"{SPACE}::{name}", lambda *_: None, lib=_library)
            key = "CompositeExplicitAutograd"
        _library.impl(name, _counted(name, op), key, allow_override=True)
    if NAME in SIMULATED:
        simdev.load(NAME)
    if not current_platform.is_cuda_alike():  # the wheel finds no platform without its device
        type(current_platform).manual_seed_all = staticmethod(torch.manual_seed)


def _counted(name: str, op: Any) -> Any:
    @functools.wraps(op)
    def counted(*args: Any) -> None:
        _calls[name] += 1
        op(*args)

    return counted


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests of others' code, and those that would run twice."""
    selected = list[pytest.Item]()
    left = list[pytest.Item]()
    for item in items:
        values = getattr(getattr(item, "callspec", None), "params", {})
        fits = values.get("device", "cuda:0") == "cuda:0"
        fits &= prod(values.get(each, 1) for each in SIZES) <= MOST
        fits &= all(values.get(each, some[0]) in some for each, some in TAKEN.items())
        (selected if fits else left).append(item)
        item.own_markers = [x for x in item.own_markers if "requires CUDA" not in str(x.kwargs)]
    config.hook.pytest_deselected(items=left)
    items[:] = selected


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Streams and the device's own calls, and what a test left as the default device."""
    if NAME == "cpu":
        monkeypatch.setattr("torch.accelerator.set_device_index", lambda _: None)
        monkeypatch.setattr("torch.accelerator.synchronize", lambda: None)
    if NAME in SIMULATED:  # torch's check of an op keeps the state of a device's random numbers
        module = torch.get_device_module(NAME)
        get = torch.get_rng_state
        monkeypatch.setattr(module, "get_rng_state", lambda *_: get(), raising=False)
        monkeypatch.setattr(module, "set_rng_state", lambda *_: None, raising=False)
    if NAME != "cuda":
        made = nullcontext if NAME == "cpu" else functools.partial(torch.Stream, NAME)
        monkeypatch.setattr("torch.cuda.Stream", made)
        monkeypatch.setattr("torch.cuda.stream", lambda stream: stream)
    with nullcontext() if NAME == "cuda" else InPlaceOfCuda(NAME):
        yield
    torch.set_default_device(None)


@pytest.fixture
def kv_cache_factory() -> Any:
    """Repeat the fixture of vLLM's conftest, whose parents import more than is installed here."""
    from vllm.utils.torch_utils import create_kv_caches_with_random

    return create_kv_caches_with_random


@pytest.fixture
def kv_cache_factory_flashinfer() -> Any:
    """Repeat vLLM's fixture, like `kv_cache_factory`."""
    from vllm.utils.torch_utils import create_kv_caches_with_random_flash

    return create_kv_caches_with_random_flash


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    counts = ", ".join(f"{name} {times}" for name, times in sorted(_calls.items())) or "none"
    terminalreporter.write_line(f"PortaKV's ops were called: {counts}")
