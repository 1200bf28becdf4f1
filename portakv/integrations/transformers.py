# SPDX-License-Identifier: Apache-2.0
"""transformers' caches over PortaKV: layers that leave the device while others run, and prefixes
that live in a pool of blocks.

``model.generate(..., past_key_values=OffloadedCache(config=model.config))`` keeps keys and values
in pinned host memory, on any device; `save_prefix` and `load_prefix` copy them between a cache and
paged memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import lru_cache, wraps
from operator import index as whole_number
from typing import Any, TypeAlias

import torch

from portakv import Index, KVView, LayoutError, SlotError, Transfer, copy_rows
from portakv.host import pinned
from portakv.integrations import IntegrationError, check_release

check_release("transformers")

from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402

__all__ = ["OffloadedCache", "PortaKVLayer", "load_prefix", "save_prefix"]

#: Keys and values, ``[batch, heads, tokens, dim]`` each.
Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
_ROWS = "kv | block head token dim"
_GRAIN = 256  # the fewest tokens of room for more


def _mixing(name: str) -> Callable[..., None]:
    """A method of transformers' own that makes rows others, so that the host has none of them."""
    own = getattr(DynamicLayer, name)

    @wraps(own)
    def method(self: PortaKVLayer, *args: Any, **named: Any) -> None:
        self.land()
        self._stored = 0
        own(self, *args, **named)

    return method


class PortaKVLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose keys and values may leave the device, and come back before they are used.

    Its host memory stays, so that rows that lie there already do not leave again: a step of
    decoding stores one row of each head. `prefetch` begins to bring keys and values back; `land`,
    and whatever reads `keys` or `values`, has them on the device.
    """

    keys: torch.Tensor  # neither is there while the layer is away
    values: torch.Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._host: Pair | None = None
        self._stored = 0  # how many of the tokens the host memory has
        self._storing = Transfer()
        self._coming = Transfer()
        self._away: Pair | None = None  # the rows, in the host memory
        self._came: Pair | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ("keys", "values") and self.__dict__.get("_away"):
            self.land()
        return super().__getattribute__(name)

    def __getstate__(self) -> dict[str, Any]:
        """Of a copy, or a pickle: it is on the device, and makes host memory of its own."""
        was_away = self.is_away
        fresh = vars(PortaKVLayer())
        self.land()
        state = vars(self) | {name: fresh[name] for name in fresh if name.startswith("_")}
        if was_away:
            self.offload()
        return state

    @property
    def is_away(self) -> bool:
        """True if keys and values are in host memory alone."""
        return self._away is not None

    def get_seq_length(self) -> int:
        """How many tokens the layer has, wherever they are."""
        return super().get_seq_length() if self._away is None else self._away[0].shape[2]

    def offload(self) -> None:
        """Copy what the host lacks, and let go of the device's memory; gradients keep it there."""
        tokens = self.get_seq_length()
        if self.is_away or not tokens or self.keys.requires_grad or self.values.requires_grad:
            return
        here = self.keys, self.values
        there = self._room(here)
        if self._stored < tokens:
            fresh = slice(self._stored, tokens)
            rows = _rows(here, fresh)
            room = _rows(there, fresh)
            self._storing = copy_rows(rows, room, stream=_streams(self.device)[0])
        self._away = (there[0][:, :, :tokens], there[1][:, :, :tokens])
        self._stored = tokens
        del self.keys, self.values

    def prefetch(self) -> None:
        """Begin to copy keys and values to the device, if they are away; blocks nothing."""
        if self._away is None or self._came is not None:
            return
        keys, values = (torch.empty_like(each, device=self.device) for each in self._away)
        self._came, stream = (keys, values), _streams(self.device)[1]
        self._storing.wait(stream)
        self._coming = copy_rows(_rows(self._away), _rows(self._came), stream=stream)

    def land(self) -> None:
        """Keys and values are on the device again for what follows on the current stream."""
        self.prefetch()
        if self._came is not None:
            self._coming.wait()
            self.keys, self.values = self._came
            self._came = self._away = None

    def crop(self, tokens_to_remove: int) -> None:
        """As transformers' own; what is left need not leave again."""
        super().crop(tokens_to_remove)
        self._stored = min(self._stored, self.get_seq_length())

    reset = _mixing("reset")  # forgets all rows, or in 5.17 zeroes them
    reorder_cache = _mixing("reorder_cache")
    batch_repeat_interleave = _mixing("batch_repeat_interleave")
    batch_select_indices = _mixing("batch_select_indices")

    def _room(self, pair: Pair) -> Pair:
        """Host memory with room for these rows; larger one has none of them yet."""
        if pair[0].dim() != 4:
            KVView(pair, _ROWS)  # raises, with shape and strides
        (batch, heads, tokens, _) = pair[0].shape
        host = self._host
        if host is None or host[0].shape[2] < tokens or host[0].shape[:2] != (batch, heads):
            sizes = [(batch, heads, tokens + max(_GRAIN, tokens // 4), x.shape[3]) for x in pair]
            keys, values = map(pinned.empty, sizes, [each.dtype for each in pair])
            host = self._host = keys, values
            self._stored = 0
        return host


class OffloadedCache(DynamicCache):  # type: ignore[misc]
    """A cache whose layers are in host memory but for the one that runs and the next one.

    As ``DynamicCache(offloading=True)``, but on any device, from and to pinned memory, and without
    storing again what has not changed. Layers with a sliding window, or of another kind, stay on
    the device.

    Args:
        config: of the model, else `IntegrationError`; None: all layers attend to all tokens.
    """

    layers: list[Any]
    layer_class_to_replicate: Any

    def __init__(self, config: Any = None) -> None:
        if config is not None and not hasattr(config, "get_text_config"):
            raise IntegrationError(
                f"OffloadedCache(config={config!r:.60}) was asked for; pass model.config, or None."
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
        *args: Any,
        **kwargs: Any,
    ) -> Pair:
        """Add rows to a layer, which then leaves, while the next one comes."""
        # The layer that runs next, in this step or in the next one.
        following = self.layers[(layer_idx + 1) % len(self.layers)] if self.layers else None
        if isinstance(following, PortaKVLayer):
            following.prefetch()
        updated: Pair = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if isinstance(layer := self.layers[layer_idx], PortaKVLayer):
            layer.offload()
        return updated


def save_prefix(
    cache: DynamicCache,
    pool: KVView,
    blocks: torch.Tensor | Sequence[Any],
    tokens: int | None = None,
) -> Transfer:
    """Copy the first tokens of a cache into blocks of a pool. Wait for the transfer before the
    blocks are used on another stream.

    Args:
        cache: whose layers attend to all tokens.
        pool: a paged view with as many layers, kv, heads and bytes of a row.
        blocks: ids, ``[n]``, or for a batch ``[batch, n]``, on host or device.
        tokens: of each sequence; None: all.

    Raises:
        LayoutError: other layers, fewer tokens, or a pool that is not paged or holds other rows.
        SlotError: no tokens, what are no ids, and on the host a negative one.
        PortaKVError: what `portakv.copy_rows` raises.
    """
    held = cache.get_seq_length()
    tokens = held if tokens is None else _whole(tokens)
    if tokens > held or not held:
        raise LayoutError(
            f"A prefix of {tokens} tokens was to be saved from a cache of {held}; expected one "
            f"that holds them. Run the model before."
        )
    rows = [(x.keys[:, :, :tokens], x.values[:, :, :tokens]) for x in _layers(cache)]
    slots, _ = _slots(pool, blocks, tokens, len(rows[0][0]))
    return copy_rows(KVView(rows, f"layer {_ROWS}"), pool, None, slots)


def load_prefix(
    cache: DynamicCache,
    pool: KVView,
    blocks: torch.Tensor | Sequence[Any],
    tokens: int,
    device: torch.device | str | None = None,
) -> Transfer:
    """Fill an empty cache with tokens out of blocks of a pool; a model goes on behind them. What
    follows on the current stream need not wait for the transfer; of pageable memory it is done.

    Args:
        cache: whose layers attend to all tokens.
        pool, blocks: as of `save_prefix`.
        tokens: of each sequence.
        device: where the model is; None: where the pool is.

    Raises:
        LayoutError: a cache that holds tokens, or has other layers; and what `save_prefix` raises.
    """
    if cache.get_seq_length():
        raise LayoutError(
            f"A prefix was to be loaded into a cache that holds {cache.get_seq_length()} tokens; "
            f"expected an empty one. Reset it, or make another."
        )
    while len(cache.layers) < pool.layers and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    (slots, batch) = _slots(pool, blocks, _whole(tokens))
    layers = _layers(cache)
    home = pool.device if device is None else device
    size = (batch, pool.heads, tokens)
    rows: list[tuple[torch.Tensor, ...]] = []
    for number in range(len(layers)):
        planes = [pool.plane(number, kv) for kv in range(pool.kv)]
        made = (torch.empty((*size, x.shape[-1]), dtype=x.dtype, device=home) for x in planes)
        rows.append(tuple(made))
    transfer = copy_rows(pool, KVView(rows, f"layer {_ROWS}"), slots)
    for layer, pair in zip(layers, rows, strict=True):  # of a refused copy the cache has nothing
        layer.lazy_initialization(*pair)
        layer.keys, layer.values = pair
    transfer.wait()
    return transfer


def _layers(cache: DynamicCache) -> list[DynamicLayer]:
    """A cache's layers, all of which attend to all tokens."""
    for number, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, PortaKVLayer):
            raise LayoutError(
                f"Layer {number} of a cache is a {type(layer).__name__}; a prefix is moved between "
                f"a pool and layers that keep every token: DynamicLayer or PortaKVLayer. Make the "
                f"cache without config=, if the model may attend to all tokens."
            )
    return list(cache.layers)


def _whole(tokens: Any) -> int:
    """A number of tokens, from what may be none."""
    with suppress(TypeError):
        if (number := whole_number(tokens)) > 0:
            return number
    raise SlotError(f"A prefix of {tokens!r} tokens was asked for; expected one at least.")


def _slots(pool: KVView, blocks: Any, tokens: int, batch: int = 0) -> tuple[Index, int]:
    """The slots of a prefix, one sequence behind the other, and how many sequences there are."""
    if pool.block_size is None:
        raise LayoutError(
            f"A prefix was asked for in {pool.layout.text!r}, without a `block` axis; pass pages."
        )
    try:
        ids = blocks if isinstance(blocks, torch.Tensor) else torch.tensor(blocks, device="cpu")
        ids = ids[None] if ids.dim() == 1 else ids
        shaped = ids.dim() == 2 and len(ids) == (batch or len(ids))
        wrong = not shaped or bool(ids.is_cpu and ids.numel() and ids.min() < 0)
    except (RuntimeError, TypeError, ValueError):
        wrong = True
    if wrong:
        raise SlotError(
            f"A prefix was asked for in blocks {blocks!r}; expected ids that are at least 0, a "
            f"list for each of {batch or 'the'} sequences, or one for one. Nothing was moved."
        )
    return Index.of_requests(ids, [tokens] * len(ids), pool.block_size), len(ids)


def _rows(pair: Sequence[torch.Tensor], tokens: slice = slice(None)) -> KVView:
    return KVView(tuple(each[:, :, tokens] for each in pair), _ROWS)


@lru_cache(maxsize=16)
def _streams(device: torch.device) -> tuple[torch.Stream | None, torch.Stream | None]:
    """Those on which layers leave a device and come back."""
    return (None, None) if device.type == "cpu" else (torch.Stream(device), torch.Stream(device))
