# SPDX-License-Identifier: Apache-2.0
"""Caches of the real transformers over PortaKV: a small model with random weights goes on exactly
as it does with transformers' own cache."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from support.ambient import STATES, State
from support.device_cases import current, delay
from support.engine_process import accelerators, answer, check_in_workers, defaults
from support.guarded_memory import refused
from support.transformers_cases import (
    BLOCKS,
    CHANGES,
    DIM,
    KV_HEADS,
    LAYERS,
    SIZE,
    pool_of,
    prompt,
    small,
)
from transformers import DynamicCache

from portakv import BackendUnavailable, KVView, LayoutError, SlotError, integrations
from portakv.integrations import IntegrationError
from portakv.integrations.transformers import caches as integration

STEPS = 6


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


@torch.no_grad()
def steps(model: Any, cache: Any, tokens: torch.Tensor, number: int = STEPS) -> torch.Tensor:
    """The logits of several steps, greedily from ``tokens`` on."""
    outputs = []
    for _ in range(number):
        logits = model(tokens, past_key_values=cache, use_cache=True).logits[:, -1:]
        outputs.append(logits)
        tokens = logits.argmax(-1)
    return torch.cat(outputs, 1)


# --- A cache whose layers leave the device --------------------------------------------------------


@pytest.mark.parametrize("configured", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_same_logits(model: Any, batch: int, configured: bool) -> None:
    """And every layer is away but the last one, which ran, and the next one."""
    cache = integration.OffloadedCache(model.config if configured else None)
    expected = steps(model, DynamicCache(), prompt(batch))
    assert torch.equal(steps(model, cache, prompt(batch)), expected)
    assert [type(layer) for layer in cache.layers] == [integration.PortaKVLayer] * LAYERS
    assert [layer.is_away for layer in cache.layers] == [True, True, False]
    tokens = 21 + STEPS - 1
    assert [layer._stored for layer in cache.layers] == [tokens, tokens, tokens - 1]
    coming = [layer._returned is not None for layer in cache.layers]
    assert coming == [True, False, False]


def test_generate_takes_it(model: Any) -> None:
    options = {"max_new_tokens": 9, "do_sample": False}
    expected = model.generate(prompt(2), **options)
    cache = integration.OffloadedCache(config=model.config)
    assert torch.equal(model.generate(prompt(2), past_key_values=cache, **options), expected)


def test_the_argument_for_a_cache_is_the_one_of_the_release(model: Any) -> None:
    """No call with it is deprecated, and a model of other code has the former one."""
    name = integration.cache_argument(model)
    release = tuple(map(int, transformers.__version__.split(".")[:2]))
    assert name == ("cache" if release >= (5, 24) else "past_key_values")
    named = {name: integration.OffloadedCache(config=model.config)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(prompt(), **named)
        model.generate(prompt(tokens=30), max_new_tokens=2, do_sample=False, **named)
    compiled = torch.compile(model, backend="eager")
    assert integration.cache_argument(compiled) == name
    assert integration.cache_argument(lambda ids, past_key_values: None) == "past_key_values"


def test_beams_are_reordered(model: Any) -> None:
    options = {"max_new_tokens": 7, "num_beams": 3, "do_sample": False}
    expected = model.generate(prompt(2), **options)
    cache = integration.OffloadedCache(config=model.config)
    assert torch.equal(model.generate(prompt(2), past_key_values=cache, **options), expected)


def test_gradients_go_through_it(model: Any) -> None:
    """Rows that need gradients do not leave, so gradients equal those of transformers' cache."""

    def gradient(cache: Any) -> Any:
        with torch.no_grad():
            model(prompt(), past_key_values=cache)
        for _ in range(2):
            logits = model(prompt(tokens=5), past_key_values=cache).logits
        weight = model.model.layers[0].self_attn.k_proj.weight
        return torch.autograd.grad(logits.sum(), weight)[0]

    cache = integration.OffloadedCache(model.config)
    assert torch.equal(gradient(cache), gradient(DynamicCache()))
    assert not any(layer.is_away for layer in cache.layers)


def test_layers_with_a_window_stay(model: Any) -> None:
    sliding = small("Mistral", sliding_window=8)
    cache = integration.OffloadedCache(config=sliding.config)
    assert not any(isinstance(layer, integration.PortaKVLayer) for layer in cache.layers)
    expected = steps(sliding, DynamicCache(config=sliding.config), prompt())
    assert torch.equal(steps(sliding, cache, prompt()), expected)


def fed(device: torch.device, layer: Any, rows: torch.Tensor) -> Any:
    """Rows ``[2, batch, heads, tokens, dim]`` as keys and values of a layer."""
    return layer.update(*rows.to(device).unbind(0))


@pytest.mark.parametrize("moment", ["here", "away", "coming"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("more", [1, 400], ids=["fits", "grows"])
def test_a_layer_is_as_transformers_own(
    device: torch.device, change: Any, moment: str, more: int
) -> None:
    """Whatever changes it, at whatever moment, and whether its host memory grows or not."""
    drawn = torch.Generator().manual_seed(0)
    ours = integration.PortaKVLayer()
    reference = transformers.cache_utils.DynamicLayer()
    first = torch.randn(2, 2, KV_HEADS, 9, DIM, generator=drawn, device="cpu")
    for layer in (ours, reference):
        fed(device, layer, first)
    ours.offload()
    ours.land()
    if moment != "here":
        ours.offload()
    if moment == "coming":
        ours.prefetch()
    for layer in (ours, reference):
        change(layer, device)
    for tokens in (more, 1, 2):
        assert ours.get_seq_length() == reference.get_seq_length()
        batch = len(reference.keys) if reference.is_initialized else 2
        rows = torch.randn(2, batch, KV_HEADS, tokens, DIM, generator=drawn, device="cpu")
        actual = fed(device, ours, rows)
        expected = fed(device, reference, rows)
        assert all(each.device == device for each in actual)
        assert all(map(torch.equal, actual, expected))
        ours.offload()


def test_only_new_rows_leave(accelerator: torch.device) -> None:
    """Rows that are in host memory are not written there again."""
    layer: Any = integration.PortaKVLayer()
    rows = torch.randn(2, 1, KV_HEADS, 9, DIM)
    fed(accelerator, layer, rows)
    layer.offload()
    layer.land()
    torch.accelerator.synchronize(accelerator)
    layer._host[0][:, :, :9] = 7.0
    fed(accelerator, layer, rows[:, :, :, :1])
    layer.offload()
    torch.accelerator.synchronize(accelerator)
    assert (layer._host[0][:, :, :9] == 7).all()
    assert torch.equal(layer._host[0][:, :, 9], rows[0, :, :, 0])


def test_it_waits_for_the_model_and_the_model_for_it(accelerator: torch.device) -> None:
    layer = integration.PortaKVLayer()
    rows = torch.randn(2, 1, KV_HEADS, 9, DIM).to(accelerator)
    late = torch.zeros_like(rows)
    torch.accelerator.synchronize(accelerator)
    delay(current(accelerator))
    late.copy_(rows)
    layer.update(*late.unbind(0))
    layer.offload()
    layer.prefetch()
    keys, values = layer.update(*late[:, :, :, :1].unbind(0))
    assert torch.equal(keys[:, :, :9].cpu(), rows[0].cpu())
    assert torch.equal(values[:, :, :9].cpu(), rows[1].cpu())


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))],
    ids=["copy", "pickle"],
)
def test_a_filled_cache_is_copied(device: torch.device, copied: Callable[[Any], Any]) -> None:
    """Prompts that share a beginning copy it: both caches go on apart, and the first stays away.
    Its last layer ran, and has not left."""
    caches = [integration.OffloadedCache(), DynamicCache()]
    rows: Any = torch.randn(LAYERS, 2, 1, KV_HEADS, 9, DIM).to(device)
    for cache in caches:
        for n in range(LAYERS):
            cache.update(*rows[n].unbind(0), n)
    caches.append(copied(caches[0]))
    away = [layer.is_away for cache in caches[::2] for layer in cache.layers]
    assert away == [True, True, False, False, False, False]
    for more in (rows[..., :1, :], rows[..., 3:5, :] + 1):
        for n in range(LAYERS):
            came = [cache.update(*more[n].unbind(0), n) for cache in caches]
            for pair in zip(*came, strict=True):
                assert torch.equal(pair[0], pair[1])
                assert torch.equal(pair[2], pair[1])
            del came, pair  # a layer whose tensors are held would stay
    assert caches[0].layers[1]._host[0].data_ptr() != caches[2].layers[1]._host[0].data_ptr()


def test_shallow_copies_of_a_layer_share_its_rows() -> None:
    """So neither leaves while the other may change them, as layers of transformers do."""
    for kind in (integration.PortaKVLayer, transformers.cache_utils.DynamicLayer):
        layer: Any = kind()
        layer.update(*torch.ones(2, 1, KV_HEADS, 9, DIM))
        other = copy.copy(layer)
        other.keys.mul_(5)
        assert (layer.keys == 5).all()
        assert getattr(layer, "is_shared", True)


def test_rows_that_are_read_come_back(device: torch.device) -> None:
    """Attention to an encoder reads them like this and adds none."""
    cache = integration.OffloadedCache()
    rows: Any = torch.randn(2, 1, KV_HEADS, 9, DIM).to(device)
    for n in range(LAYERS):
        cache.update(*rows.unbind(0), n)
    assert [layer.is_away for layer in cache.layers] == [True, True, False]
    for layer in cache.layers:
        assert layer.get_seq_length() == 9
        assert torch.equal(layer.values, rows[1])
        assert not layer.is_away
        assert torch.equal(layer.keys, rows[0])


def test_a_model_with_an_encoder() -> None:
    config = transformers.T5Config(
        vocab_size=64, d_model=32, d_kv=DIM, d_ff=32, num_layers=LAYERS, num_heads=2
    )
    torch.manual_seed(0)
    model: Any = transformers.T5ForConditionalGeneration(config).eval()
    options = {"max_new_tokens": 7, "do_sample": False, "decoder_start_token_id": 0}
    both = transformers.EncoderDecoderCache(
        integration.OffloadedCache(), integration.OffloadedCache()
    )
    assert torch.equal(
        model.generate(prompt(), past_key_values=both, **options),
        model.generate(prompt(), **options),
    )
    assert [x.is_away for x in both.self_attention_cache.layers] == [True, True, False]


# --- Prefixes in a pool ---------------------------------------------------------------------------


POOLS = pytest.mark.parametrize(
    "layout", ["layer | kv block token head dim", "block layer kv head token dim"]
)


@POOLS
@pytest.mark.parametrize("kind", [DynamicCache, integration.OffloadedCache])
@pytest.mark.parametrize("batch", [1, 2])
@torch.no_grad()
def test_a_model_goes_on_behind_a_prefix(
    model: Any, device: torch.device, layout: str, kind: type[Any], batch: int
) -> None:
    """The prefix leaves one cache, stays in blocks of a pool, and another cache takes it."""
    pool = pool_of(device, layout)
    tokens = prompt(batch)
    before = kind()
    first = model(tokens, past_key_values=before).logits[:, -1:].argmax(-1)
    blocks = torch.randperm(BLOCKS)[: 3 * batch].reshape(batch, 3)
    integration.save_prefix(before, pool, blocks if batch > 1 else blocks[0]).synchronize()
    expected = steps(model, before, first)
    after = kind()
    integration.load_prefix(after, pool, blocks if batch > 1 else blocks[0].tolist(), 21, "cpu")
    assert after.get_seq_length() == 21
    assert torch.equal(steps(model, after, first), expected)


@torch.no_grad()
def test_part_of_a_prefix_serves_another_request(model: Any) -> None:
    """Two requests that share 16 tokens: the second one reads the rest alone."""
    pool = pool_of(torch.device("cpu"), "layer | kv block token head dim")
    tokens = prompt(1, 30)
    cache = DynamicCache()
    model(tokens, past_key_values=cache)
    integration.save_prefix(cache, pool, [5, 2], 16)
    other = torch.cat([tokens[:, :16], prompt(1, 9)], 1)
    shared = DynamicCache(config=model.config)
    integration.load_prefix(shared, pool, [5, 2], 16)
    came = model(other[:, 16:], past_key_values=shared).logits
    assert torch.allclose(came, model(other).logits[:, 16:], atol=1e-5)


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_whatever_torch_was_told_before(device: torch.device, state: State) -> None:
    """A layer leaves and comes back, and a prefix goes through a pool."""
    pool = pool_of(device, "block layer kv head token dim")
    rows: Any = torch.randn(LAYERS, 2, 1, KV_HEADS, 9, DIM).to(device)
    before = integration.OffloadedCache()
    after = integration.OffloadedCache()
    with state(device):
        for n in range(LAYERS):
            before.update(*rows[n].unbind(0), n)
        integration.save_prefix(before, pool, [4, 2]).synchronize()
        integration.load_prefix(after, pool, [4, 2], 9)
        came = [after.update(*rows[n, :, :, :, :1].unbind(0), n) for n in range(LAYERS)]
    for pair, wanted in zip(came, rows, strict=True):
        for each, right in zip(pair, wanted, strict=True):
            assert torch.equal(each[:, :, :9].cpu(), right.cpu())


def test_what_is_refused(model: Any) -> None:
    pool = pool_of(torch.device("cpu"), "layer | kv block token head dim")
    cache = DynamicCache()
    steps(model, cache, prompt(), 1)
    with refused(LayoutError, "21 tokens"):
        integration.load_prefix(cache, pool, [1, 2, 3], 21)
    with refused(SlotError, "21 tokens", "2 blocks"):
        integration.save_prefix(cache, pool, [1, 2])
    with refused(SlotError, "slot"):
        integration.save_prefix(cache, pool, [1, 2, BLOCKS])
    with refused(SlotError, "-1"):
        integration.save_prefix(cache, pool, [1, 2, -1])
    with refused(LayoutError, "22 tokens", "of 21"):
        integration.save_prefix(cache, pool, [1, 2, 3], 22)
    with refused(LayoutError, "0 tokens", "of 0"):
        integration.save_prefix(DynamicCache(), pool, [1, 2, 3])
    with refused(SlotError, "a prefix of 0 tokens"):
        integration.save_prefix(cache, pool, [1, 2, 3], 0)
    chunk = KVView(torch.zeros(2, LAYERS, 32, KV_HEADS, DIM), "kv layer token head dim")
    with refused(LayoutError, "`block` axis"):
        integration.save_prefix(cache, chunk, [0])
    sliding = small("Mistral", sliding_window=8)
    windowed = DynamicCache(config=sliding.config)
    steps(sliding, windowed, prompt(), 1)
    with refused(LayoutError, "layer 0", "DynamicSlidingWindowLayer"):
        integration.save_prefix(windowed, pool, [1, 2, 3])
    with refused(IntegrationError, "config='llama'", "model.config"):
        integration.OffloadedCache("llama")


REFUSED = {
    "a block past the pool": ([1, 2, BLOCKS], 21, LAYERS, SlotError, "slot"),
    "a negative block": ([1, 2, -1], 21, LAYERS, SlotError, "-1"),
    "no tokens": ([1, 2, 3], 0, LAYERS, SlotError, "of 0 tokens"),
    "fewer than none": ([1, 2, 3], -1, LAYERS, SlotError, "of -1 tokens"),
    "fewer layers": ([1, 2, 3], 21, LAYERS - 1, LayoutError, "extent 3"),
    "more layers": ([1, 2, 3], 21, LAYERS + 1, LayoutError, "layer 3"),
}


@pytest.mark.parametrize(
    ("blocks", "tokens", "layers", "error", "message"), REFUSED.values(), ids=REFUSED
)
def test_a_refused_prefix_leaves_the_cache_empty(
    blocks: list[int], tokens: int, layers: int, error: Any, message: str
) -> None:
    pool = pool_of(torch.device("cpu"), "layer | kv block token head dim")
    config = small(num_hidden_layers=layers).config
    cache = DynamicCache(config=config)
    with refused(error, message):
        integration.load_prefix(cache, pool, blocks, tokens)
    assert cache.get_seq_length() == 0


OF_OTHERS = [1, 2, 3], [1, 2, 3, 4], [[1, 2], [3, 4], [5, 6]]  # which one or three may have


@pytest.mark.parametrize("blocks", ["x", None, [[1, 2], [3]], [2**70], *OF_OTHERS])
def test_what_are_no_blocks(blocks: Any) -> None:
    pool = pool_of(torch.device("cpu"), "layer | kv block token head dim")
    cache = DynamicCache()
    for n in range(LAYERS):
        cache.update(*torch.zeros(2, 2, KV_HEADS, 9, DIM), n)
    with refused(SlotError, "blocks", repr(blocks)[:9], "2 sequences"):
        integration.save_prefix(cache, pool, blocks)
    if blocks not in OF_OTHERS:
        with refused(SlotError, "blocks", repr(blocks)[:9]):
            integration.load_prefix(DynamicCache(), pool, blocks, 9)


@pytest.mark.parametrize("tokens", ["48", None, 4.5, torch.ones(2)])
def test_what_are_no_tokens(tokens: Any) -> None:
    pool = pool_of(torch.device("cpu"), "layer | kv block token head dim")
    with refused(SlotError, f"of {tokens!r} tokens"):
        integration.load_prefix(DynamicCache(), pool, [1, 2], tokens)


@pytest.mark.parametrize("shape", [(2, 9, DIM), (1, KV_HEADS, 9, DIM, 2)])
def test_rows_that_were_never_seen(shape: tuple[int, ...]) -> None:
    layer = integration.PortaKVLayer()
    rows = torch.zeros(shape)
    layer.update(rows, rows)
    with refused(LayoutError, f"shape {shape}, strides {rows.stride()}"):
        layer.offload()
    assert not layer.is_away


def test_a_device_without_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layer stays where it is, with all of its rows."""
    layer = integration.PortaKVLayer()
    rows = torch.randn(2, 1, KV_HEADS, 9, DIM)
    layer.update(*rows)
    monkeypatch.setenv("PORTAKV_BACKEND", "cuda")
    with refused(BackendUnavailable, "cpu"):
        layer.offload()
    assert not layer.is_away
    assert torch.equal(layer.keys, rows[0])
    assert torch.equal(layer.values, rows[1])


def test_two_models_in_one_process(model: Any) -> None:
    """The models take turns, each with a separate cache and number type."""
    other = small("Qwen2").to(torch.bfloat16)
    pairs = [(each, integration.OffloadedCache(each.config)) for each in (model, other)]
    expected = [steps(each, DynamicCache(), prompt()) for each, _ in pairs]
    tokens = [prompt()] * 2
    outputs = [list[torch.Tensor](), list[torch.Tensor]()]
    for _ in range(STEPS):
        for n, (each, cache) in enumerate(pairs):
            outputs[n].append(steps(each, cache, tokens[n], 1))
            tokens[n] = outputs[n][-1].argmax(-1)
    for actual, right in zip(outputs, expected, strict=True):
        assert torch.equal(torch.cat(actual, 1), right)


def test_a_pool_that_was_made_again() -> None:
    """The same addresses or others, nothing holds the memory of the pool before."""
    cache = DynamicCache()
    after = DynamicCache()
    rows = torch.randn(LAYERS, 2, 1, KV_HEADS, 9, DIM)
    for n in range(LAYERS):
        cache.update(*rows[n], n)
    for _ in range(3):
        memory = np.zeros((BLOCKS, LAYERS, 2, KV_HEADS, SIZE, DIM), dtype=np.float32)
        gone = weakref.ref(memory)
        pool = KVView(torch.from_numpy(memory), "block layer kv head token dim")
        integration.save_prefix(cache, pool, [4, 2])
        after = DynamicCache()
        integration.load_prefix(after, pool, [4, 2], 9)
        assert all(torch.equal(after.layers[n].keys, rows[n, 0]) for n in range(LAYERS))
        del pool, memory
        gc.collect()
        assert gone() is None


# --- Whole processes ------------------------------------------------------------------------------

ROUND = """
import torch

def judge(device="cpu"):
    from transformers import DynamicCache
    from portakv import KVView
    from portakv.integrations.transformers import OffloadedCache, load_prefix, save_prefix
    rows = torch.randn(3, 2, 1, 2, 9, 16, device="cpu", dtype=torch.float32)
    pool = KVView(
        torch.zeros(24, 3, 2, 2, 8, 16, device=device, dtype=torch.float32),
        "block layer kv head token dim",
    )
    cache, other = OffloadedCache(), OffloadedCache()
    for first in range(0, 9, 3):
        for n in range(3):
            cache.update(*rows[n, :, :, :, first : first + 3].to(device), n)
    save_prefix(cache, pool, [4, 2]).synchronize()
    load_prefix(other, pool, [4, 2], 9)
    for n in range(3):
        found = other.update(*rows[n, :, :, :, :1].to(device), n)
        for each, right in zip(found, rows[n]):
            assert each[:, :, :9].cpu().equal(right)
"""
SIMULATED = "from portakv_conformance import simdev\nsimdev.load()\n"


@pytest.mark.full
def test_defaults_of_torch_that_were_set_before_the_first_use() -> None:
    """Each in a fork of a process that has only imported torch and transformers."""
    before = ["torch.set_default_device('meta')", "torch.set_default_dtype(torch.bfloat16)"]
    code = f"""{ROUND}
import os
import transformers.cache_utils

for before in {[*before, "; ".join(before)]}:
    if not os.fork():
        exec(before)
        judge()
        raise SystemExit
    assert os.wait()[1] == 0, before
print("right")
"""
    assert answer(code) == "right"


@accelerators
@pytest.mark.full
def test_an_accelerator_that_is_the_default_device(name: str) -> None:
    code = f"{ROUND}{defaults(name)}judge({name!r})\nprint('right')"
    assert answer(code) == "right"


@pytest.mark.full
def test_in_worker_processes() -> None:
    check_in_workers(f"{ROUND}\nwork = judge\n")


@pytest.mark.full
def test_a_process_may_end_while_layers_are_under_way() -> None:
    code = f"""{SIMULATED}
import torch
from portakv.integrations.transformers import OffloadedCache
cache, rows = OffloadedCache(), torch.ones(2, 4, 8, 512, 64, device="simdev")
for n in (*range(8), 0, 1):
    simdev.delay(torch.accelerator.current_stream(), 200)
    cache.update(*rows, n)
print("issued")
"""
    assert answer(code) == "issued"


def test_the_installed_release_is_in_the_matrix() -> None:
    assert integrations.why_not("transformers") is None
