# SPDX-License-Identifier: Apache-2.0
"""Caches of transformers whose layers leave the device, and prefixes in a pool of blocks.

``model.generate(..., cache=OffloadedCache(config=model.config))`` keeps keys and values in pinned
host memory, on any device; before transformers 5.24 the argument is ``past_key_values``.
`save_prefix` and `load_prefix` copy keys and values between a cache and paged memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from inspect import signature
from operator import index as whole_number
from typing import NamedTuple, ParamSpec, SupportsIndex, TypeAlias, TypeVar

import torch

from portakv import Index, KVView, LayoutError, SlotError, Transfer, copy_rows
from portakv.arguments import kind_of
from portakv.host import pinned
from portakv.integrations import IntegrationError, check_release
from portakv.runtime.bounded import Bounded

check_release("transformers")

from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402

__all__ = ["OffloadedCache", "PortaKVLayer", "cache_argument", "load_prefix", "save_prefix"]

#: Keys and values, ``[batch, heads, tokens, dim]`` each.
Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
#: Ids of blocks, ``[n]`` or ``[batch, n]``.
Blocks: TypeAlias = "torch.Tensor | Sequence[int] | Sequence[Sequence[int]]"
P = ParamSpec("P")
R = TypeVar("R")
_ROWS = "kv | block head token dim"
_WITHOUT_CONFIG = (
    "If the model may attend to all tokens, make the cache without config=; else keep it as it is, "
    "as no part of it can be a prefix."
)
_GRAIN = 256  # the fewest tokens by which host memory grows


class _Streams(NamedTuple):
    """The streams of a device on which layers leave and return; None for the host."""

    leaving: torch.Stream | None
    returning: torch.Stream | None


def _outside_graphs(method: Callable[P, R]) -> Callable[P, R]:
    """Return a method that breaks the graph of a compiled function and runs outside of it.

    A compiler can trace neither the registration of host memory nor the life of a tensor. This
    loads torch's compiler, as each model of transformers does.
    """
    why = "PortaKV registers host memory, and looks at who else holds a tensor"
    outside: Callable[P, R] = torch.compiler.disable(method, reason=why)
    return outside


class PortaKVLayer(DynamicLayer):  # type: ignore[misc]
    """A layer whose keys and values can leave the device, and return before they are used.

    The layer retains its host memory, so that a stored row is not copied again: a decoding step
    stores one row of each head. `prefetch` begins to copy keys and values back. `land`, and every
    read of `keys` or `values`, makes them available on the device.

    Other code may assign `keys` and `values`, or change them in place. The layer then stores all of
    its rows again. A layer that was read counts as changed, because no library can see every
    change. A tensor that `update` returned counts as changed if torch counted a change of it.
    """

    device: torch.device

    def __init__(self, **kwargs: object) -> None:
        # The keys and values on the device: None before the first update and while they are away.
        self._here: tuple[torch.Tensor | None, torch.Tensor | None] = (None, None)
        self._host: Pair | None = None
        self._stored = 0  # tokens whose rows are in the host memory
        # torch's counts of changes of `_here` when the host memory had `_stored` of its rows; None:
        # other code may have changed rows since.
        self._counts: tuple[int, int] | None = None
        self._storing = Transfer()
        self._returning = Transfer()
        self._away: Pair | None = None  # the rows in the host memory, while the layer is away
        self._returned: Pair | None = None  # the rows on the device, while they are copied
        super().__init__(**kwargs)

    @property
    def keys(self) -> torch.Tensor:
        """Return the keys on the device, ``[batch, heads, tokens, dim]``, for any use."""
        return self._exposed()[0]  # type: ignore[return-value]  # None as transformers has it

    @keys.setter
    def keys(self, keys: torch.Tensor | None) -> None:
        self._here = (keys, self._exposed()[1])

    @property
    def values(self) -> torch.Tensor:
        """Return the values on the device, ``[batch, heads, tokens, dim]``, for any use."""
        return self._exposed()[1]  # type: ignore[return-value]  # None as transformers has it

    @values.setter
    def values(self, values: torch.Tensor | None) -> None:
        self._here = (self._exposed()[0], values)

    def __getstate__(self) -> dict[str, object]:
        """Return the state of a copy, or of a pickle.

        The copy is on the device and allocates its own host memory.
        """
        was_away = self.is_away
        fresh = vars(PortaKVLayer())
        self.land()
        keys, values = self._here
        state = vars(self) | {name: fresh[name] for name in fresh if name.startswith("_")}
        state["_here"] = (keys, values)  # another tuple, so that both layers are shared
        if was_away:
            self.offload()
        return state

    @property
    def is_away(self) -> bool:
        """Return True if keys and values are in host memory only."""
        return self._away is not None

    @property
    def is_shared(self) -> bool:
        """Return True if other code holds the keys or values on the device, or a view of them.

        Such memory stays allocated after `offload`, and a change of it would no longer change the
        layer.
        """
        if not self.get_seq_length() or self._away is not None:
            return False
        if _references(self._here) > _references((object(), object())):
            return True
        return any(_holders(each) > 1 for each in self.landed())

    def get_seq_length(self) -> int:
        """Return the number of tokens in the layer, whether it is away or not."""
        if self._away is not None:
            return self._away[0].shape[-2]
        keys = self._here[0]
        if not self.is_initialized or keys is None or not keys.numel():
            return 0
        return keys.shape[-2]

    @_outside_graphs
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,
        **kwargs: object,
    ) -> Pair:
        """Add rows as transformers does. The rows before them need not be stored again."""
        self.land()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._stored = self._unchanged()
        if torch.is_inference_mode_enabled():  # in which torch counts no changes of new tensors
            with torch.inference_mode(False), torch.no_grad():
                keys, values = self._joined(key_states, value_states)
        else:
            keys, values = self._joined(key_states, value_states)
        self._here = (keys, values)
        self._counts = _changes(keys, values)
        return keys, values

    def _store(self) -> bool:
        """Copy the rows that the host lacks. Return True if the host memory has all rows.

        Rows that need gradients are not copied, nor keys and values of unequal length or heads, nor
        rows on another device than the layer's.
        """
        if self._away is not None:
            return True
        tokens = self.get_seq_length()
        keys, values = self._here
        if not tokens or keys is None or values is None:
            return False
        if keys.requires_grad or values.requires_grad or keys.shape[:-1] != values.shape[:-1]:
            return False
        if not keys.device == values.device == self.device:
            return False
        self._stored = self._unchanged()
        there = self._host_memory((keys, values))
        if self._stored < tokens:
            fresh = slice(self._stored, tokens)
            src = _rows((keys, values), fresh)
            dst = _rows(there, fresh)
            self._storing = copy_rows(src, dst, stream=_streams(self.device).leaving)
        self._stored = tokens
        if self._counts is not None:
            self._counts = _changes(*self._here)
        return True

    @_outside_graphs
    def offload(self) -> None:
        """Copy the rows that the host lacks, and release the device's memory.

        A tensor that other code still holds is a copy from then on: a change of it does not change
        the layer. Some rows stay on the device: rows that need gradients, rows on another device,
        and keys and values of unequal length or heads.

        Raises:
            LayoutError: keys or values that are not ``[batch, heads, tokens, dim]``.
            PortaKVError: an error of `portakv.copy_rows`.
        """
        if self._away is None and self._store():
            self._away = self._host_rows()
            self._here = (None, None)

    @_outside_graphs
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
        if self._away is not None:
            self._land()

    @_outside_graphs
    def _land(self) -> None:
        self.prefetch()
        assert self._returned is not None
        self._returning.wait()
        self._here = self._returned
        self._returned = None
        self._away = None
        self._counts = _changes(*self._here)

    def landed(self) -> Pair:
        """Return keys and values on the device. The caller must not change them."""
        self.land()
        keys, values = self._here
        assert keys is not None
        assert values is not None
        return keys, values

    @_outside_graphs
    def rows(self) -> Pair:
        """Return keys and values in host memory, or on the device if `offload` leaves them there.

        Blocks the host until rows that are leaving the device have arrived. The caller must not
        change the rows.
        """
        if not self._store():
            return self.landed()
        self._storing.synchronize()
        return self._host_rows()

    @_outside_graphs
    def crop(self, tokens_to_remove: int) -> None:
        """Remove tokens as transformers does. The remaining rows need not be stored again."""
        self.land()
        is_known = self._counts is not None
        stored = self._unchanged()
        super().crop(tokens_to_remove)
        if is_known:
            self._stored = min(stored, self.get_seq_length())
            self._counts = _changes(*self._here)

    def _joined(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
        """Return new tensors: the present keys and values, and more of them."""
        keys, values = self.landed()
        return torch.cat((keys, key_states), dim=-2), torch.cat((values, value_states), dim=-2)

    def _exposed(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return keys and values for other code, which may change them now or later."""
        self.land()
        self._counts = None
        return self._here

    def _unchanged(self) -> int:
        """Return the number of tokens whose rows are in the host memory as they are here."""
        return self._stored if self._counts == _changes(*self._here) else 0

    def _host_rows(self) -> Pair:
        """Return the stored rows in the host memory."""
        assert self._host is not None
        keys, values = (each[:, :, : self._stored] for each in self._host)
        return keys, values

    def _host_memory(self, pair: Pair) -> Pair:
        """Return host memory with capacity for these rows.

        New memory holds none of the rows yet.
        """
        if pair[0].dim() != 4:
            KVView(pair, _ROWS)  # raises, with shape and strides
        host = self._host
        if host is None or not all(map(_fits, pair, host)):
            batch, heads, tokens, _ = pair[0].shape
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
    another kind, stay on the device. So do layers whose keys or values other code still holds, as
    it may change them.

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
        self._ran: list[PortaKVLayer] = []  # the layers that an update left on the device

    @_outside_graphs
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> Pair:
        """Add rows to a layer, while the layers before it leave and the next one returns."""
        running = None
        following = None
        if layer_idx < len(self.layers):  # else `update` makes the layer
            running = self.layers[layer_idx]
            # After the last layer the first one runs, in the next step.
            following = self.layers[(layer_idx + 1) % len(self.layers)]
        # A layer leaves only after its attention: until then the model has its keys and values,
        # and may change them.
        remaining = []
        for ran in self._ran:
            if ran in (running, following) or ran.is_shared:
                remaining.append(ran)
            else:
                ran.offload()
        self._ran = remaining
        if isinstance(following, PortaKVLayer):
            following.prefetch()
        updated: Pair = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        layer = self.layers[layer_idx]
        if isinstance(layer, PortaKVLayer) and layer not in self._ran:
            self._ran.append(layer)
        return updated


def cache_argument(model: Callable[..., object]) -> str:
    """Return the name of a model's argument that takes a cache.

    It is ``cache`` since transformers 5.24, and ``past_key_values`` before and in models of other
    code. ``generate`` has the same one.
    """
    from transformers import GenerationMixin  # takes a second, and a model has it already

    names = signature(getattr(model, "forward", model)).parameters
    if not {"cache", "past_key_values"} & set(names):  # a compiled model, or another wrapper
        names = signature(GenerationMixin.prepare_inputs_for_generation).parameters
    return "cache" if "cache" in names else "past_key_values"


@_outside_graphs
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
    rows = []
    for layer in layers_of(cache):
        keys, values = rows_on_device(layer)
        rows.append((keys[:, :, :tokens], values[:, :, :tokens]))
    ids = _ids(pool, blocks, len(rows[0][0]))
    return copy_rows(KVView(rows, f"layer {_ROWS}"), pool, None, _slots(pool, ids, tokens))


@_outside_graphs
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
    check_empty(cache)
    tokens = _whole(tokens)
    layers = layers_of(cache, least=pool.layers)
    ids = _ids(pool, blocks)
    target = pool.device if device is None else device
    size = (len(ids), pool.heads, tokens)
    rows: list[tuple[torch.Tensor, ...]] = []
    for number in range(len(layers)):
        planes = [pool.plane(number, kv) for kv in range(pool.kv)]
        made = (torch.empty((*size, x.shape[-1]), dtype=x.dtype, device=target) for x in planes)
        rows.append(tuple(made))
    transfer = copy_rows(pool, KVView(rows, f"layer {_ROWS}"), _slots(pool, ids, tokens))

    # The cache gets the rows last, so that a refused copy leaves it empty.
    fill(layers, rows)
    transfer.wait()
    return transfer


def check_empty(cache: DynamicCache) -> None:
    """Raise `LayoutError` for a cache that holds tokens."""
    if cache.get_seq_length():
        raise LayoutError(
            f"Expected an empty cache to load a prefix into, got a cache of "
            f"{cache.get_seq_length()} tokens. Reset it, or make another."
        )


def fill(layers: Sequence[DynamicLayer], rows: Sequence[Sequence[torch.Tensor]]) -> None:
    """Give empty layers their keys and values."""
    for layer, pair in zip(layers, rows, strict=True):
        layer.lazy_initialization(*pair)
        layer.keys, layer.values = pair


def layers_of(cache: DynamicCache, do: str = _WITHOUT_CONFIG, least: int = 0) -> list[DynamicLayer]:
    """Return a cache's layers, of which an empty cache may lack some.

    Raises `LayoutError`, which ends with ``do``, unless all of them retain every token.
    """
    made = cache.layer_class_to_replicate
    while len(cache.layers) < least and made is not None:
        cache.layers.append(made())
    for number, layer in enumerate(cache.layers):
        if type(layer) not in (DynamicLayer, PortaKVLayer):
            raise LayoutError(
                f"Expected layer {number} of the cache to retain every token, as DynamicLayer and "
                f"PortaKVLayer do, got {kind_of(layer)}. {do}"
            )
    return list(cache.layers)


def rows_on_device(layer: DynamicLayer) -> Pair:
    """Return a layer's keys and values on the device. The caller must not change them."""
    if isinstance(layer, PortaKVLayer):
        return layer.landed()
    return layer.keys, layer.values


def _whole(tokens: SupportsIndex) -> int:
    """Return a positive number of tokens, or raise `SlotError` for any other value."""
    with suppress(TypeError):  # of a value that is not a whole number
        if (number := whole_number(tokens)) > 0:
            return number
    raise SlotError(
        f"Expected a whole number of at least 1 as the length of a prefix, got a prefix of "
        f"{tokens!r} tokens. Correct the number."
    )


def _slots(pool: KVView, ids: torch.Tensor, tokens: int) -> Index:
    """Return the slots of a prefix, sequence after sequence."""
    return Index.of_requests(ids, [tokens] * len(ids), pool.block_size or 1)


def _ids(pool: KVView, blocks: Blocks, batch: int = 0) -> torch.Tensor:
    """Return ids of blocks, ``[batch, n]``. ``batch`` 0: they show the number of sequences."""
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
    return ids


def _rows(pair: Sequence[torch.Tensor], tokens: slice = slice(None)) -> KVView:
    return KVView(tuple(each[:, :, tokens] for each in pair), _ROWS)


def _changes(keys: torch.Tensor | None, values: torch.Tensor | None) -> tuple[int, int]:
    """Return how often torch counted a change of keys and of values.

    It counts none of a tensor that was made in inference mode. `PortaKVLayer.update` returns no
    such tensor, and other code gets one only from `PortaKVLayer._exposed`.
    """
    keys_and_values = (keys, values)
    counts = [0 if x is None or x.is_inference() else x._version for x in keys_and_values]
    return counts[0], counts[1]


def _fits(rows: torch.Tensor, memory: torch.Tensor) -> bool:
    """Return True if the memory, with capacity for more tokens, has room for rows."""
    return rows.dtype == memory.dtype and memory[:, :, : rows.shape[2]].shape == rows.shape


def _references(pair: tuple[object, object]) -> int:
    """Return the number of references of Python to two objects."""
    return sys.getrefcount(pair[0]) + sys.getrefcount(pair[1])


def _holders(tensor: torch.Tensor) -> int:
    """Return the number of tensors over the memory of a tensor, itself and its views."""
    storage = tensor.untyped_storage()
    holders: int = torch._C._storage_Use_Count(storage._cdata)
    return holders - 1  # without the storage's object in Python


def _streams(device: torch.device) -> _Streams:
    """Return the streams on which layers leave a device and return."""
    if device.type == "cpu":
        return _Streams(None, None)
    made = _known_streams.get(device)
    if made is None:
        streams = _Streams(torch.Stream(device), torch.Stream(device))
        made = _known_streams.setdefault(device, streams)
    return made


_known_streams: Bounded[torch.device, _Streams] = Bounded("streams of transformers' layers", 16)
