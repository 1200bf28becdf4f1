# SPDX-License-Identifier: Apache-2.0
"""What a cache of a hybrid model has at one position: windows, states, and rows of a begun block.

Layers with a sliding window retain its rows alone, and recurrent layers a state after the last
token. So such a cache can be stored only as it is, after exactly so many tokens. A **tail** is all
of that as bytes, beside the whole blocks of rows of layers that attend to all tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from portakv import KVView, LayoutError
from portakv.arguments import kind_of
from portakv.integrations import check_release
from portakv.integrations.transformers.caches import PortaKVLayer, rows_on_device

check_release("transformers")

from transformers import cache_utils  # noqa: E402

#: Keys and values of a layer, ``[batch, heads, tokens, dim]`` each.
Pair: TypeAlias = "tuple[torch.Tensor, torch.Tensor]"
#: Bytes of which the places of pieces in a tail are multiples.
UNIT = 16
#: A part of a tail: its shape for one sequence, and its dtype.
Piece: TypeAlias = "tuple[tuple[int, ...], torch.dtype]"
_Linear: Any = cache_utils.LinearAttentionLayer
#: Kinds of layers whose rows of all tokens are stored.
FULL = (
    cache_utils.DynamicLayer,
    PortaKVLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer,
)
#: The kind of layers that keep nothing; None: this release has none.
EMPTY = getattr(cache_utils, "DummyLayer", None)
#: The dictionaries of a recurrent layer that have its states.
STATES = ("conv_states", "recurrent_states")
#: Kinds of layers that retain the rows of a window.
SLIDING = (
    cache_utils.DynamicSlidingWindowLayer,
    cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
)


class Layer(NamedTuple):
    """What is stored of a layer.

    Attributes:
        kind: of the layer, as the model's own cache has it.
        rows: keys and values of a token, ``[1, heads, 1, dim]`` each; None: it has none.
        window: the most tokens whose rows it retains; None: all.
        states: of each of its states the name of the layer's dictionary that has it, its key there,
            and one state, ``[1, ...]``.
    """

    kind: type
    rows: Pair | None
    window: int | None
    states: tuple[tuple[str, int, torch.Tensor], ...]


def layers_in(cache: Any, do: str) -> list[Layer]:
    """Return what is stored of each layer of a cache, which holds the rows of a token.

    Raises `LayoutError`, which ends with ``do``, for kinds of layers that are not stored.
    """
    made = list[Layer]()
    for number, layer in enumerate(cache.layers):
        kind = type(layer)
        if kind not in (*FULL, *SLIDING, _Linear, EMPTY):
            raise LayoutError(
                f"Expected layer {number} of the cache to retain rows of tokens or states, as "
                f"DynamicLayer, DynamicSlidingWindowLayer and LinearAttentionLayer do, got "
                f"{kind_of(layer)}. {do}"
            )
        has_rows = kind in (*FULL, *SLIDING) and layer.keys is not None and layer.keys.numel() > 0
        if kind in (*FULL, *SLIDING) and not has_rows:
            raise LayoutError(
                f"Expected layer {number} of the cache to have the rows of a token after the model "
                f"has run, got none: the model keeps them, or a state, outside of the cache. {do}"
            )
        rows = rows_on_device(layer) if has_rows else None
        window = layer.sliding_window - 1 if kind in SLIDING else None
        states = [
            (name, key, state)
            for name in STATES
            for key, state in getattr(layer, name, {}).items()
            if state is not None
        ]
        made.append(Layer(kind, rows, window, tuple(states)))
    return made


class Tails:
    """The tails of a model's caches, as bytes of one length.

    Args:
        layers: of the model; see `layers_in`.
        size: the tokens of a stored block.

    Attributes:
        nbytes: of a tail.
    """

    def __init__(self, layers: Sequence[Layer], size: int) -> None:
        self.layers = layers
        self.size = size
        some = [rows for layer in layers if layer.rows is not None for rows in layer.rows]
        some += [state for layer in layers for _, _, state in layer.states]
        self.device = some[0].device
        self._pieces = [self._pieces_of(layer) for layer in layers]
        self.nbytes = sum(_room(piece) for pieces in self._pieces for piece in pieces)

    @property
    def notes(self) -> str:
        """Return what fixes the bytes of a tail."""
        return f"tails of {self.size}: " + "; ".join(
            ", ".join(f"{[*shape]} {dtype}" for shape, dtype in pieces) for pieces in self._pieces
        )

    def view(self, data: torch.Tensor) -> KVView:
        """Return a view of bytes, uint8 ``[sequences, nbytes]``."""
        return KVView(data.view(len(data), 1, -1), "block token dim")

    def empty(self, sequences: int) -> torch.Tensor:
        """Return memory for the tails of sequences."""
        shape = (sequences, self.nbytes)
        return torch.zeros(shape, dtype=torch.uint8, device=self.device)

    def of(self, cache: Any, tokens: int) -> torch.Tensor:
        """Return the tail of each sequence of a cache that has so many tokens, uint8 ``[batch,
        nbytes]``."""
        begun = tokens % self.size
        parts = list[torch.Tensor]()
        batch = 1
        for layer, each in zip(cache.layers, self.layers, strict=True):
            pieces = list[torch.Tensor]()
            if each.rows is not None:
                many = begun if each.window is None else min(tokens, each.window)
                for rows, (shape, _) in zip(
                    rows_on_device(layer), self._rows_of(each), strict=True
                ):
                    padded = rows.new_zeros(len(rows), *shape)
                    padded[:, :, :many] = rows[:, :, rows.shape[2] - many :]
                    pieces.append(padded)
            pieces += [getattr(layer, name)[key] for name, key, _ in each.states]
            for piece in pieces:
                batch = len(piece)
                raw = piece.to(self.device).reshape(batch, -1).contiguous().view(torch.uint8)
                parts.append(torch.nn.functional.pad(raw, (0, -raw.shape[1] % UNIT)))
        return torch.cat(parts, 1) if parts else self.empty(batch)

    def fill(
        self, cache: Any, tails: torch.Tensor, tokens: int, rows: Sequence[Pair | None]
    ) -> None:
        """Give the empty layers of a cache what sequences of so many tokens have.

        ``rows``: of each layer the rows of whole blocks, if it attends to all tokens.
        """
        begun = tokens % self.size
        start = 0
        for layer, each, whole, pieces in zip(
            cache.layers, self.layers, rows, self._pieces, strict=True
        ):
            read = list[torch.Tensor]()
            for piece in pieces:
                shape, dtype = piece
                nbytes = math.prod(shape) * dtype.itemsize
                raw = tails[:, start : start + nbytes].contiguous().view(dtype)
                read.append(raw.reshape(len(tails), *shape))
                start += _room(piece)
            if each.rows is not None:
                many = begun if each.window is None else min(tokens, each.window)
                pair = [part[:, :, :many] for part in read[:2]]
                if whole is not None:
                    pair = [torch.cat(both, 2) for both in zip(whole, pair, strict=True)]
                layer.lazy_initialization(*pair)
                layer.keys, layer.values = pair
                if each.window is not None:
                    layer.cumulative_length = tokens
                read = read[2:]
            for (name, key, _), state in zip(each.states, read, strict=True):
                layer.lazy_initialization(**{name: state}, state_idx=key)
                getattr(layer, name)[key].copy_(state)
                layer.has_previous_state[key] = True

    def _rows_of(self, layer: Layer) -> list[Piece]:
        """Return the pieces for the rows of a layer: of its window, or of a begun block."""
        if layer.rows is None:
            return []
        many = self.size - 1 if layer.window is None else layer.window
        return [((x.shape[1], many, x.shape[3]), x.dtype) for x in layer.rows]

    def _pieces_of(self, layer: Layer) -> list[Piece]:
        states = [(tuple(state.shape[1:]), state.dtype) for _, _, state in layer.states]
        return [*self._rows_of(layer), *states]


def _room(piece: Piece) -> int:
    """Return the bytes of a piece in a tail."""
    shape, dtype = piece
    return -(-math.prod(shape) * dtype.itemsize // UNIT) * UNIT
