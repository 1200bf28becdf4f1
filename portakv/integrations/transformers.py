# SPDX-License-Identifier: Apache-2.0
"""Caches of transformers whose layers leave the device, and prefixes in a pool of blocks.

``model.generate(..., past_key_values=OffloadedCache(config=model.config))`` keeps keys and values
in pinned host memory, on any device. `save_prefix` and `load_prefix` copy keys and values between a
cache and paged memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, wraps
from operator import index as whole_number
from typing import Any, NamedTuple, SupportsIndex, TypeAlias

import torch

from portakv import Index, KVView, LayoutError, SlotError, Transfer, copy_rows
from portakv.arguments import kind_of
from portakv.host import pinned
from portakv.integrations import IntegrationError, check_release

check_release("transformers")

from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402

__all__ = ["OffloadedCache", "PortaKVLayer", "load_prefix", "save_prefix"]

#: Keys and values, ``[batch, heads, tokens, dim]`` each.
Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
#: Ids of blocks, ``[n]`` or ``[batch, n]``.
Blocks: TypeAlias = "torch.Tensor | Sequence[int] | Sequence[Sequence[int]]"
_ROWS = "kv | block head token dim"
_GRAIN = 256  # the fewest tokens by which host memory grows


class _Streams(NamedTuple):
    """The streams of a device on which layers leave and return; None for the host."""

    leaving: torch.Stream | None
    returning: torch.Stream | None


class _Prefix(NamedTuple):
    """The slots of a prefix, sequence after sequence, and the number of sequences."""

    slots: Index
    batch: int


def _rewriting(name: str) -> Callable[..., None]:
    """Return a method of transformers' layer that changes stored rows, so that the host's rows
    become stale."""
    own = getattr(DynamicLayer, name)

    @wraps(own)
    def method(self: PortaKVLayer, *args: object, **named: object) -> None:
        self.land()
        self._stored = 0
        own(self, *args, **named)

    return method


class PortaKVLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose keys and values can leave the device, and return before they are used.

    The layer retains its host memory, so that a stored row is not copied again: a decoding step
    stores one row of each head. `prefetch` begins to copy keys and values back. `land`, and every
    read of `keys` or `values`, makes them available on the device.
    """

    keys: torch.Tensor  # both attributes are missing while the layer is away
    values: torch.Tensor
    device: torch.device

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self._host: Pair | None = None
        self._stored = 0  # tokens whose rows are in the host memory
        self._storing = Transfer()
        self._returning = Transfer()
        self._away: Pair | None = None  # the rows in the host memory, while the layer is away
        self._returned: Pair | None = None  # the rows on the device, while they are copied

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values") and self.__dict__.get("_away"):
            self.land()
        return super().__getattribute__(name)

    def __getstate__(self) -> dict[str, object]:
        """Return the state of a copy, or of a pickle.

        The copy is on the device and allocates its own host memory.
        """
        was_away = self.is_away
        fresh = vars(PortaKVLayer())
        self.land()
        state = vars(self) | {name: fresh[name] for name in fresh if name.startswith("_")}
        if was_away:
            self.offload()
        return state

    @property
    def is_away(self) -> bool:
        """Return True if keys and values are in host memory only."""
        return self._away is not None

    def get_seq_length(self) -> int:
        """Return the number of tokens in the layer, whether it is away or not."""
        return super().get_seq_length() if self._away is None else self._away[0].shape[2]

    def offload(self) -> None:
        """Copy the rows that the host lacks, and release the device's memory.

        Rows that need gradients stay on the device.
        """
        tokens = self.get_seq_length()
        if self.is_away or not tokens or self.keys.requires_grad or self.values.requires_grad:
            return
        here = (self.keys, self.values)
        there = self._host_memory(here)
        if self._stored < tokens:
            fresh = slice(self._stored, tokens)
            src = _rows(here, fresh)
            dst = _rows(there, fresh)
            self._storing = copy_rows(src, dst, stream=_streams(self.device).leaving)
        self._away = (there[0][:, :, :tokens], there[1][:, :, :tokens])
        self._stored = tokens
        del self.keys, self.values

    def prefetch(self) -> None:
        """Begin to copy keys and values to the device if they are away, without blocking."""
        if self._away is None or self._returned is not None:
            return
        keys, values = (torch.empty_like(each, device=self.device) for each in self._away)
        self._returned = (keys, values)
        stream = _streams(self.device).returning
        self._storing.wait(stream)
        self._returning = copy_rows(_rows(self._away), _rows(self._returned), stream=stream)

    def land(self) -> None:
        """Make keys and values available on the device, for later work of the current stream."""
        self.prefetch()
        if self._returned is not None:
            self._returning.wait()
            self.keys, self.values = self._returned
            self._returned = None
            self._away = None

    def rows(self) -> Pair:
        """Return keys and values where they are: in host memory while the layer is away.

        Blocks the host until rows that are leaving the device have arrived.
        """
        if self._away is None:
            return self.keys, self.values
        self._storing.synchronize()
        return self._away

    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens as transformers does. The remaining rows need not be stored again."""
        super().crop(tokens_to_remove)
        self._stored = min(self._stored, self.get_seq_length())

    reset = _rewriting("reset")  # drops all rows; in 5.17 it fills them with zeros
    reorder_cache = _rewriting("reorder_cache")
    batch_repeat_interleave = _rewriting("batch_repeat_interleave")
    batch_select_indices = _rewriting("batch_select_indices")

    def _host_memory(self, pair: Pair) -> Pair:
        """Return host memory with capacity for these rows.

        New memory holds none of the rows yet.
        """
        if pair[0].dim() != 4:
            KVView(pair, _ROWS)  # raises, with shape and strides
        batch, heads, tokens, _ = pair[0].shape
        host = self._host
        if host is None or host[0].shape[2] < tokens or host[0].shape[:2] != (batch, heads):
            capacity = tokens + max(_GRAIN, tokens // 4)
            sizes = [(batch, heads, capacity, each.shape[3]) for each in pair]
            keys, values = map(pinned.empty, sizes, [each.dtype for each in pair])
            host = self._host = (keys, values)
            self._stored = 0
        return host


class OffloadedCache(DynamicCache):  # type: ignore[misc]
    """A cache whose layers are in host memory, except the running layer and the next one.

    It does the work of ``DynamicCache(offloading=True)`` on any device. It copies from and to
    pinned memory, and stores no unchanged row again. Layers with a sliding window, and layers of
    another kind, stay on the device.

    Args:
        config: the model's configuration; None: all layers attend to all tokens.

    Raises:
        IntegrationError: ``config`` is not a model's configuration.
    """

    layers: list[DynamicLayer]
    layer_class_to_replicate: type[DynamicLayer] | None

    def __init__(self, config: object = None) -> None:
        if config is not None and not hasattr(config, "get_text_config"):
            raise IntegrationError(
                f"Expected a model's configuration or None, got OffloadedCache("
                f"config={config!r:.60}). Pass model.config."
            )
        super().__init__(config=config)
        self.layers = [PortaKVLayer() if type(x) is DynamicLayer else x for x in self.layers]
        if self.layer_class_to_replicate is DynamicLayer:
            self.layer_class_to_replicate = PortaKVLayer

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> Pair:
        """Add rows to a layer and offload it, while the next layer returns to the device."""
        # After the last layer the first one runs, in the next step.
        following = self.layers[(layer_idx + 1) % len(self.layers)] if self.layers else None
        if isinstance(following, PortaKVLayer):
            following.prefetch()
        updated: Pair = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, PortaKVLayer):
            layer.offload()
        return updated


def save_prefix(
    cache: DynamicCache, pool: KVView, blocks: Blocks, tokens: int | None = None
) -> Transfer:
    """Copy the first tokens of a cache into blocks of a pool.

    Wait for the transfer before you use the blocks on another stream.

    Args:
        cache: a cache whose layers attend to all tokens.
        pool: a paged view with as many layers, kv, heads and bytes of a row.
        blocks: ids ``[n]``, or for a batch ``[batch, n]``, on host or device.
        tokens: tokens of each sequence; None: all.

    Raises:
        LayoutError: other layers, fewer tokens, or a pool that is not paged or has other rows.
        SlotError: no tokens, values that are not ids, or a negative id on the host.
        PortaKVError: an error of `portakv.copy_rows`.
    """
    available = cache.get_seq_length()
    tokens = available if tokens is None else _whole(tokens)
    if tokens > available or not available:
        raise LayoutError(
            f"Expected a cache that holds the prefix, got a prefix of {tokens} tokens and a cache "
            f"of {available}. Run the model before."
        )
    rows = [(x.keys[:, :, :tokens], x.values[:, :, :tokens]) for x in layers_of(cache)]
    prefix = _prefix(pool, blocks, tokens, len(rows[0][0]))
    return copy_rows(KVView(rows, f"layer {_ROWS}"), pool, None, prefix.slots)


def load_prefix(
    cache: DynamicCache,
    pool: KVView,
    blocks: Blocks,
    tokens: int,
    device: torch.device | str | None = None,
) -> Transfer:
    """Fill an empty cache with tokens from blocks of a pool. A model can continue after them.

    Later work on the current stream is ordered after the copy and need not wait for the transfer.
    A copy from pageable memory has ended when the call returns.

    Args:
        cache: a cache whose layers attend to all tokens.
        pool: a paged view with as many layers, kv, heads and bytes of a row.
        blocks: ids ``[n]``, or for a batch ``[batch, n]``, on host or device.
        tokens: tokens of each sequence.
        device: the device of the model; None: the device of the pool.

    Raises:
        LayoutError: a cache that holds tokens or has other layers, or an error of `save_prefix`.
        SlotError: as for `save_prefix`.
        PortaKVError: an error of `portakv.copy_rows`.
    """
    if cache.get_seq_length():
        raise LayoutError(
            f"Expected an empty cache to load a prefix into, got a cache of "
            f"{cache.get_seq_length()} tokens. Reset it, or make another."
        )
    while len(cache.layers) < pool.layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    prefix = _prefix(pool, blocks, _whole(tokens))
    layers = layers_of(cache)
    target = pool.device if device is None else device
    size = (prefix.batch, pool.heads, tokens)
    rows: list[tuple[torch.Tensor, ...]] = []
    for number in range(len(layers)):
        planes = [pool.plane(number, kv) for kv in range(pool.kv)]
        made = (torch.empty((*size, x.shape[-1]), dtype=x.dtype, device=target) for x in planes)
        rows.append(tuple(made))
    transfer = copy_rows(pool, KVView(rows, f"layer {_ROWS}"), prefix.slots)

    # The cache gets the rows last, so that a refused copy leaves it empty.
    for layer, pair in zip(layers, rows, strict=True):
        layer.lazy_initialization(*pair)
        layer.keys, layer.values = pair
    transfer.wait()
    return transfer


def layers_of(cache: DynamicCache) -> list[DynamicLayer]:
    """Return a cache's layers. Raises `LayoutError` unless all of them retain every token."""
    for number, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, PortaKVLayer):
            raise LayoutError(
                f"Expected layer {number} of the cache to retain every token, as DynamicLayer and "
                f"PortaKVLayer do, got {kind_of(layer)}. Make the cache without config= "
                f"if the model may attend to all tokens."
            )
    return list(cache.layers)


def _whole(tokens: SupportsIndex) -> int:
    """Return a positive number of tokens, or raise `SlotError` for any other value."""
    with suppress(TypeError):  # of a value that is not a whole number
        if (number := whole_number(tokens)) > 0:
            return number
    raise SlotError(
        f"Expected a whole number of at least 1 as the length of a prefix, got a prefix of "
        f"{tokens!r} tokens. Correct the number."
    )


def _prefix(pool: KVView, blocks: Blocks, tokens: int, batch: int = 0) -> _Prefix:
    """Return the slots of a prefix. ``batch`` 0: the ids show the number of sequences."""
    if pool.block_size is None:
        raise LayoutError(
            f"Expected a paged pool, got {pool.layout.text!r}, without a `block` axis. Pass pages."
        )
    try:
        ids = blocks if isinstance(blocks, torch.Tensor) else torch.tensor(blocks, device="cpu")
        ids = ids[None] if ids.dim() == 1 else ids
        shaped = ids.dim() == 2 and len(ids) == (batch or len(ids))
        wrong = not shaped or bool(ids.is_cpu and ids.numel() and ids.min() < 0)
    except (RuntimeError, TypeError, ValueError):  # torch makes no tensor of such blocks
        wrong = True
    if wrong:
        raise SlotError(
            f"Expected block ids of 0 or more, a list for each of {batch or 'the'} sequences, or "
            f"one list for one sequence, got blocks {blocks!r}. Nothing was moved. Correct the ids."
        )
    slots = Index.of_requests(ids, [tokens] * len(ids), pool.block_size)
    return _Prefix(slots, len(ids))


def _rows(pair: Sequence[torch.Tensor], tokens: slice = slice(None)) -> KVView:
    return KVView(tuple(each[:, :, tokens] for each in pair), _ROWS)


@lru_cache(maxsize=16)
def _streams(device: torch.device) -> _Streams:
    """Return the streams on which layers leave a device and return."""
    if device.type == "cpu":
        return _Streams(None, None)
    return _Streams(torch.Stream(device), torch.Stream(device))
