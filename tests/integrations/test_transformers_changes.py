# SPDX-License-Identifier: Apache-2.0
"""Other code changes an offloaded cache of the real transformers, or compiles what calls it: each
gives what transformers' own cache gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.transformers_cases import CHANGES, DIM, KV_HEADS, LAYERS, pool_of, prompt, small
from transformers import DynamicCache

from portakv.integrations.transformers import caches as integration


@pytest.fixture(scope="module")
def model() -> Any:
    return small()


# --- Other code that changes keys and values ------------------------------------------------------


def pruned(layer: Any) -> None:
    layer.keys = layer.keys[:, :, ::2]
    layer.values = layer.values[:, :, ::2]


def longer(layer: Any) -> None:
    layer.keys = torch.cat([layer.keys, layer.keys + 1], 2)
    layer.values = torch.cat([layer.values, layer.values + 1], 2)


def flipped(layer: Any) -> None:
    layer.keys = layer.keys.flip(2)
    layer.values = layer.values.flip(2)


def replaced(layer: Any) -> None:
    layer.keys = torch.full_like(layer.keys, 0.25)
    layer.values = torch.full_like(layer.values, 0.5)


def assigned_rows(layer: Any) -> None:
    layer.keys[:, :, 0] = 2.0
    layer.values[:, :, -1] = 3.0


def in_place(layer: Any) -> None:
    layer.keys.mul_(0.5)
    layer.values.add_(1.0)


def uncounted(layer: Any) -> None:
    """Writes that torch does not count."""
    layer.keys.data[:, :, 0].zero_()
    layer.values.data.neg_()


def only_keys(layer: Any) -> None:
    layer.keys = layer.keys * 2


EDITS = {
    each.__name__: each
    for each in (
        *(pruned, longer, flipped, replaced, assigned_rows, in_place, uncounted, only_keys),
    )
}
MODES = {"no grad": torch.no_grad, "inference": torch.inference_mode}
EVERY_EDIT = pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
EVERY_MODE = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def equal_rows(ours: Any, reference: Any) -> bool:
    """Return True if two layers, or pairs of tensors, are equal."""
    pairs = [x if isinstance(x, tuple) else (x.keys, x.values) for x in (ours, reference)]
    for own, other in zip(*pairs, strict=True):
        if (own is None) != (other is None):
            return False
        if own is not None and not (own.dtype == other.dtype and torch.equal(own, other)):
            return False
    return True


def four_steps(model: Any, cache: Any, edit: Callable[[Any], None], edited: set[int]) -> Any:
    """Return the logits of four steps; after some of them each layer of the cache is edited."""
    tokens = prompt(2)
    outputs = []
    for step in range(4):
        positions = torch.arange(tokens.shape[1])[None] + step
        named: Any = {integration.cache_argument(model): cache, "position_ids": positions}
        outputs.append(model(tokens, use_cache=True, **named).logits[:, -1:])
        tokens = outputs[-1].argmax(-1)
        for layer in cache.layers if step in edited else ():
            edit(layer)
    return torch.cat(outputs, 1)


@EVERY_MODE
@EVERY_EDIT
@pytest.mark.parametrize("edited", [{0}, {0, 1, 2, 3}], ids=["after the prompt", "in each step"])
def test_a_model_goes_on_after_a_change(
    model: Any, edit: Callable[[Any], None], mode: Any, edited: set[int]
) -> None:
    cache = integration.OffloadedCache(model.config)
    reference = DynamicCache(config=model.config)
    with mode():
        outputs = [four_steps(model, each, edit, edited) for each in (cache, reference)]
        assert torch.equal(*outputs)
        assert all(map(equal_rows, cache.layers, reference.layers))


@EVERY_MODE
@EVERY_EDIT
def test_a_hook_changes_a_layer_after_its_attention(edit: Callable[[Any], None], mode: Any) -> None:
    """As libraries do that prune or quantise a cache."""
    hooked = small()
    caches = [integration.OffloadedCache(hooked.config), DynamicCache(config=hooked.config)]
    current = caches[0]
    for number, block in enumerate(hooked.model.layers):
        block.self_attn.register_forward_hook(lambda *_, n=number: edit(current.layers[n]))
    outputs = []
    with mode():
        for current in caches:
            outputs.append(four_steps(hooked, current, edit, set()))
        assert torch.equal(*outputs)
        assert all(map(equal_rows, caches[0].layers, caches[1].layers))


def run_and_change(cache: Any, rows: Any, moment: int, view: bool) -> None:
    """Update each layer, and change what the first one returned after layer ``moment`` ran."""
    keys = cache.update(*rows, 0)[0]
    held = keys[:, :, 2:5] if view else keys
    del keys
    for n in range(1, moment + 1):
        cache.update(*rows, n)
    held.mul_(5)
    for n in range(moment + 1, LAYERS):
        cache.update(*rows, n)


@EVERY_MODE
@pytest.mark.parametrize("view", [False, True])
@pytest.mark.parametrize("moment", range(LAYERS))
def test_a_change_of_what_update_returned(
    device: torch.device, mode: Any, moment: int, view: bool
) -> None:
    """At any time until the layer's next update, while other layers run."""
    ours = integration.OffloadedCache()
    reference = DynamicCache()
    with mode():
        rows: Any = torch.randn(2, 1, KV_HEADS, 9, DIM).to(device)
        for _ in range(3):
            for cache in (ours, reference):
                run_and_change(cache, rows, moment, view)
        assert all(map(equal_rows, ours.layers, reference.layers))


def test_a_layer_that_other_code_holds_stays_until_released() -> None:
    cache = integration.OffloadedCache()
    rows: Any = torch.randn(2, 1, KV_HEADS, 9, DIM)
    held = [cache.update(*rows, n)[0] for n in range(LAYERS)]
    assert [layer.is_away for layer in cache.layers] == [False] * LAYERS
    held = [each[:, :, :1] for each in held]
    assert all(layer.is_shared for layer in cache.layers)
    del held
    cache.update(*rows, 0)
    assert [layer.is_away for layer in cache.layers] == [False, False, True]
    assert not cache.layers[0].is_shared


def test_a_read_layer_leaves_as_a_whole(accelerator: torch.device) -> None:
    """No library can see each write to a tensor, so what was read is stored again."""
    layer: Any = integration.PortaKVLayer()
    rows = torch.randn(2, 1, KV_HEADS, 9, DIM)
    layer.update(*rows.to(accelerator))
    layer.offload()
    layer.keys.data.mul_(5)
    layer.offload()
    assert torch.equal(layer.rows()[0], rows[0] * 5)


def test_rows_of_unequal_length_stay() -> None:
    layer: Any = integration.PortaKVLayer()
    layer.update(*torch.randn(2, 1, KV_HEADS, 9, DIM))
    layer.keys = layer.keys[:, :, :4]
    layer.offload()
    assert not layer.is_away
    assert layer.get_seq_length() == 4


def test_rows_of_another_type_and_width(device: torch.device) -> None:
    """The host memory of a layer is made again for what other code assigned."""
    caches = [integration.OffloadedCache(), DynamicCache()]
    rows: Any = torch.randn(2, 1, KV_HEADS, 9, DIM).to(device)
    for cache in caches:
        for n in range(LAYERS):
            cache.update(*rows, n)
        for layer in cache.layers:
            layer.keys = layer.keys[..., :8].to(torch.bfloat16)
            layer.values = layer.values.to(torch.bfloat16)
        half = (rows[0][..., :8].to(torch.bfloat16), rows[1].to(torch.bfloat16))
        for _ in range(2):
            for n in range(LAYERS):
                cache.update(*half, n)
    assert all(map(equal_rows, caches[0].layers, caches[1].layers))


class Twins:
    """One cache of ours and one of transformers, on which the same calls are made.

    ``held`` are tensors that the calls returned, of both caches.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.drawn = torch.Generator().manual_seed(0)
        self.ours = integration.OffloadedCache()
        self.reference = DynamicCache()
        self.held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, number: int, tokens: int, hold: bool) -> None:
        if number > len(self.reference.layers):
            return
        known = number < len(self.reference.layers) and self.reference.layers[number].is_initialized
        keys = self.reference.layers[number].keys if known else None
        batch = 2 if keys is None else len(keys)
        rows = torch.randn(2, batch, KV_HEADS, tokens, DIM, generator=self.drawn, device="cpu")
        rows = rows.to(self.device)
        ours = self.ours.update(*rows, number)
        reference = self.reference.update(*rows, number)
        assert equal_rows(ours, reference)
        if hold:
            self.held.append((ours[0], reference[0]))

    def step(self, tokens: int) -> None:
        for number in range(LAYERS):
            self.update(number, tokens, hold=False)

    def edit(self, number: int, name: str) -> None:
        for cache in (self.ours, self.reference):
            layer = cache.layers[number] if number < len(cache.layers) else None
            if layer is not None and layer.get_seq_length():
                EDITS[name](layer)

    def hold(self, number: int) -> None:
        """Hold a view of what is read."""
        if number < len(self.reference.layers) and self.reference.layers[number].get_seq_length():
            ours = self.ours.layers[number].values[:, :, :1]
            self.held.append((ours, self.reference.layers[number].values[:, :, :1]))

    def edit_held(self, at: int) -> None:
        if self.held:
            for each in self.held[at % len(self.held)]:
                each.mul_(1.5)

    def release(self) -> None:
        self.held.clear()

    def change(self, number: int, name: str) -> None:
        """Call a method of a layer; reordering needs the batch of two."""
        layers = [x.layers[number] for x in (self.ours, self.reference) if number < len(x.layers)]
        batch = {len(x.keys) for x in layers if x.get_seq_length()}
        if batch == {2} or (layers and name in ("cropped", "reset")):
            for layer in layers:
                CHANGES[name](layer, self.device)

    def copy(self) -> None:
        self.release()
        self.ours = copy.deepcopy(self.ours)

    def compare(self) -> None:
        lengths = [[x.get_seq_length() for x in c.layers] for c in (self.ours, self.reference)]
        assert lengths[0] == lengths[1]

    def read(self) -> None:
        assert all(map(equal_rows, self.ours.layers, self.reference.layers))


NUMBERS = st.integers(0, LAYERS - 1)
CALLS = st.one_of(
    st.tuples(st.just("step"), st.sampled_from([1, 1, 3, 300])),
    st.tuples(st.just("update"), NUMBERS, st.sampled_from([1, 4]), st.booleans()),
    st.tuples(st.just("edit"), NUMBERS, st.sampled_from(sorted(EDITS))),
    st.tuples(st.just("hold"), NUMBERS),
    st.tuples(st.just("edit_held"), st.integers(0, 5)),
    st.tuples(st.just("release")),
    st.tuples(st.just("change"), NUMBERS, st.sampled_from(sorted(CHANGES))),
    st.tuples(st.just("copy")),
    st.tuples(st.just("read")),
)


@EVERY_MODE
def test_any_calls_give_what_transformers_cache_gives(device: torch.device, mode: Any) -> None:
    """Reads, assignments and changes in place, at any time, of any layer."""

    @given(st.lists(CALLS, min_size=4, max_size=16))
    def check(calls: list[tuple[Any, ...]]) -> None:
        with mode():
            twins = Twins(device)
            twins.step(5)
            for name, *arguments in calls:
                getattr(twins, name)(*arguments)
                twins.compare()
            twins.step(1)
            twins.read()

    check()


# --- Under torch's compiler -----------------------------------------------------------------------

COMPILERS = pytest.mark.parametrize("compiler", ["eager", "aot_eager"])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Without what other tests compiled, whose guards and limits would count here."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@COMPILERS
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_generates(compiler: str) -> None:
    options = {"max_new_tokens": 5, "do_sample": False}
    compiled = small()
    expected = compiled.generate(prompt(2), **options)
    compiled.forward = torch.compile(compiled.forward, backend=compiler)
    cache = integration.OffloadedCache(config=compiled.config)
    assert torch.equal(compiled.generate(prompt(2), past_key_values=cache, **options), expected)
    assert [layer.is_away for layer in cache.layers] == [True, True, False]


def calls_of_models(cache: Any, rows: torch.Tensor) -> tuple[object, ...]:
    """Call all that models and generation call of a cache."""
    sums: list[torch.Tensor] = []

    def step() -> None:
        for n in range(LAYERS):
            sums.extend(each.sum() for each in cache.update(rows[0], rows[1], n))

    step()
    lengths = [cache.get_seq_length(), cache.get_mask_sizes(1, 0)]
    cache.reorder_cache(torch.tensor([1, 0]))
    step()
    cache.crop(-3)
    sums.append(cache.layers[0].keys.sum())
    cache.layers[1].keys.mul_(2)
    cache.layers[2].values = cache.layers[2].values.flip(2)
    step()
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    step()
    lengths.append(cache.get_seq_length())
    return torch.stack(sums).tolist(), lengths


@COMPILERS
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_calls_of_a_cache(compiler: str) -> None:
    rows = torch.randn(2, 2, KV_HEADS, 9, DIM)
    compiled = torch.compile(calls_of_models, backend=compiler)
    for _ in range(2):
        cache = integration.OffloadedCache()
        reference = DynamicCache()
        assert compiled(cache, rows) == calls_of_models(reference, rows)
        assert all(map(equal_rows, cache.layers, reference.layers))


@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_compiled_copies_of_a_prefix(model: Any) -> None:
    pool = pool_of(torch.device("cpu"), "block layer kv head token dim")
    cache = integration.OffloadedCache()
    model(prompt(), past_key_values=cache)

    def copied(cache: Any) -> Any:
        integration.save_prefix(cache, pool, [4, 2, 7]).synchronize()
        other = DynamicCache()
        integration.load_prefix(other, pool, [4, 2, 7], 21)
        return other

    other = torch.compile(copied, backend="eager")(cache)
    assert all(map(equal_rows, cache.layers, other.layers))
