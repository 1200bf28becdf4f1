# SPDX-License-Identifier: Apache-2.0
"""Prefixes of prompts that survive the process: caches of transformers over a block store.

    with PrefixStore(model, {"folder": "/nvme0/kv"}) as store:
        cache = store.load(input_ids)
        output = model.generate(input_ids, cache=cache)  # before 5.24: past_key_values=cache
        store.save(cache, output)

Another process with the same model goes on with what this one has saved.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any, TypeAlias

import torch

from portakv import KVView, LayoutError, Transfer
from portakv.arguments import invalid, kind_of, text
from portakv.integrations import IntegrationError, check_release
from portakv.integrations.transformers.caches import (
    PortaKVLayer,
    cache_argument,
    check_empty,
    fill,
    layers_of,
    rows_on_device,
)
from portakv.integrations.transformers.tails import Layer, Tails, layers_in
from portakv.serving import StoreTerms
from portakv.serving.local import checksum_of_tensors
from portakv.serving.prefixes import Prefixes, check_terms

check_release("transformers")

from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402

__all__ = ["PrefixStore"]

#: Keys and values of each layer, ``[batch, heads, tokens, dim]`` each.
Rows: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"
_PAGES = "layer kv | head (block token) dim"  # of one sequence
#: The tokens with which a model is tried, before and after its cache was stored.
TRIED = 11
#: The most that logits may differ by then, of the largest one: sums have another order.
NEAR = 0.05
#: Kinds of rotary positions that depend on the length of the whole prompt.
_BY_LENGTH = ("dynamic", "longrope")


class PrefixStore:
    """The prefixes of a model's prompts in a store: on a disk, in a bucket, in host memory.

    A prefix is stored in blocks, each under a key of all tokens up to its end. Another process with
    the same model and terms loads it; one process at a time has a folder.

    A store that fails is not an error: what it lacks is computed, and the log has a line.

    Args:
        model: a decoder. It runs once, for one token, whose rows fix the form of the blocks. One
            with windows or states runs a few times more, to see that it goes on from a stored
            prefix as it should.
        terms: `portakv.serving.StoreTerms`, or a mapping of its names. ``block_size`` is 64 unless
            it is set; ``shared`` and ``by_layer`` are for engines.
        name: a name for the model. The form has a checksum of its configuration and of samples of
            its weights now anyway. After a change of the weights, make another store.

    Raises:
        IntegrationError: an object that is not a model with a configuration; a model with an
            encoder, or whose rotary positions depend on the length of the prompt; one that does
            not go on from its own states.
        LayoutError: a kind of layer that is not stored, or layers with different rows.
        InvalidTerms: wrong terms, or a wrong name.
        StoreError, StoreBusy: memory for no block; a folder that another process has.
    """

    def __init__(
        self, model: Any, terms: StoreTerms | Mapping[str, object], name: str = ""
    ) -> None:
        checked = check_terms(terms)
        text("name", name, least=0)
        config = _config_of(model)
        self._config = config
        self._layers = _layers_of(model)
        size = checked.block_size
        assert size is not None
        self._is_full = [*map(_is_full, self._layers)]
        self._tails = None if all(map(_attends_to_all, self._layers)) else Tails(self._layers, size)
        view = _pages(self._empty(1, size), 0, size) if any(self._is_full) else None
        identity = (
            name or type(model).__name__,
            _checksum_of(config),
            checksum_of_tensors([*model.named_parameters(), *model.named_buffers()]),
        )
        named = ":".join(identity)
        if self._tails is None:
            self._prefixes = Prefixes(view, checked, named)
            return
        _check_going_on(model, self._tails)
        tail = self._tails.view(self._tails.empty(1))
        self._prefixes = Prefixes(view, checked, named, tail=tail, notes=self._tails.notes)

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def load(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        cache: DynamicCache | None = None,
        salt: bytes = b"",
    ) -> DynamicCache:
        """Return a cache with the longest stored prefix of prompts; it is empty if there is none.

        The last token of a prompt is never loaded, so that the model computes it. A batch gets the
        prefix that all of its prompts have stored. Of a model with windows or states a prefix ends
        where a cache was saved.

        Args:
            input_ids: whole numbers, ``[batch, tokens]``.
            attention_mask: ``[batch, tokens]``, without zeros; None: no padding.
            cache: an empty cache to fill; None: a `DynamicCache`.
            salt: what the rows depend on besides the tokens, such as an image.

        Raises:
            InvalidTerms: ids of another shape or kind, prompts with padding, a wrong salt.
            LayoutError: a cache that holds tokens, or has other layers.
        """
        prompts = _prompts(input_ids, attention_mask)
        cache = DynamicCache(config=self._config) if cache is None else cache
        check_empty(cache)
        self._check(cache)
        size = self._prefixes.block_size
        keys = [self._prefixes.keys(prompt[:-1], salt) for prompt in prompts]
        leading = min([self._prefixes.lookup(each) for each in keys], default=0)
        tokens = leading * size
        if self._tails is not None:
            tokens = self._longest(prompts, keys, leading, salt)
            leading = tokens // size
        rows = self._empty(len(prompts), leading * size)
        if leading and rows:
            landed = [
                self._prefixes.load(_pages(rows, number, size), each[:leading])
                for number, each in enumerate(keys)
            ]
            if min(landed) < leading:
                tokens = min(landed) * size if self._tails is None else 0
        if tokens:
            whole = [(x[:, :, :tokens], y[:, :, :tokens]) for x, y in rows]
            self._fill(cache, prompts, keys, salt, tokens, whole)
        return cache

    def _longest(
        self, prompts: Any, keys: Sequence[Sequence[bytes]], leading: int, salt: bytes
    ) -> int:
        """Return the most tokens after which all prompts have a tail, and rows before them, as far
        as the store answers until the deadline of the terms."""
        size = self._prefixes.block_size
        until = time.monotonic() + self._prefixes.deadline
        for blocks in range(leading, -1, -1):
            lengths = range(min(size - 1, len(prompts[0]) - 1 - blocks * size), -1, -1)
            found = [True] * len(lengths)
            for prompt, each in zip(prompts, keys, strict=True):
                rest = prompt[blocks * size :].tolist()
                names = [
                    self._prefixes.tail_key(each[:blocks], rest[:many], salt) for many in lengths
                ]
                left = until - time.monotonic()
                if left <= 0:
                    return 0
                both = zip(found, self._prefixes.has_tails(names, left), strict=True)
                found = [one and other for one, other in both]
            if True in found:
                return blocks * size + lengths[found.index(True)]
        return 0

    def _fill(
        self,
        cache: DynamicCache,
        prompts: Any,
        keys: Sequence[Sequence[bytes]],
        salt: bytes,
        tokens: int,
        rows: Rows,
    ) -> None:
        """Give an empty cache a prefix; it stays empty if a tail does not come."""
        if self._tails is None:
            fill(cache.layers, rows)
        else:
            blocks = tokens // self._prefixes.block_size
            tails = self._tails.empty(len(prompts))
            for number, (prompt, each) in enumerate(zip(prompts, keys, strict=True)):
                rest = prompt[blocks * self._prefixes.block_size : tokens].tolist()
                name = self._prefixes.tail_key(each[:blocks], rest, salt)
                view = self._tails.view(tails[number : number + 1])
                if not self._prefixes.load_tail(view, name):
                    return
            left = iter(rows)
            whole = [next(left) if full and blocks else None for full in self._is_full]
            self._tails.fill(cache, tails, tokens, whole)
        for layer in cache.layers:
            if isinstance(layer, PortaKVLayer):
                layer.offload()

    def save(
        self,
        cache: DynamicCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        salt: bytes = b"",
    ) -> list[Transfer]:
        """Save the whole blocks of a cache that the store lacks; return a transfer for each prompt.

        The cache may be changed when the call returns. The transfers end when the blocks are
        stored; `close` waits for them too.

        Args:
            cache: the cache after the model has run.
            input_ids: the tokens whose rows the cache has, from the first one on, such as the
                output of ``generate``. Tokens after those of the cache are ignored.
            attention_mask, salt: as for `load`.

        Raises:
            InvalidTerms: as `load`, and for another number of prompts than the cache has.
            LayoutError: a cache with other layers.
        """
        prompts = _prompts(input_ids, attention_mask)
        self._check(cache)
        size = self._prefixes.block_size
        tokens = min(len(prompts[0]), cache.get_seq_length())
        saved = list[Transfer]()
        if not tokens:
            return saved
        both = zip(cache.layers, self._is_full, strict=True)
        full = [layer for layer, is_full in both if is_full]
        # All on one device: in host memory if a layer is away.
        own = [layer for layer in full if isinstance(layer, PortaKVLayer)]
        if len(own) == len(full) and any(layer.is_away for layer in own):
            rows = [layer.rows() for layer in own]
        else:
            rows = [rows_on_device(layer) for layer in full]
        tails = None
        if self._tails is not None and tokens == cache.get_seq_length():
            tails = self._tails.of(cache, tokens)
        if tails is None and not rows:
            return saved  # its windows and states are those of a later position
        batch = len(tails if tails is not None else rows[0][0])
        if batch != len(prompts):
            expected = f"ids of the {batch} prompts of the cache"
            raise invalid("input_ids", expected, input_ids, "Pass one row for each prompt.")
        whole = tokens // size * size
        cut = [(keys[:, :, :whole], values[:, :, :whole]) for keys, values in rows]
        for number, prompt in enumerate(prompts):
            keys = self._prefixes.keys(prompt[:whole], salt)
            handles = [self._prefixes.save(_pages(cut, number, size), keys)] if cut and keys else []
            if tails is not None and self._tails is not None:
                name = self._prefixes.tail_key(keys, prompt[whole:tokens].tolist(), salt)
                view = self._tails.view(tails[number : number + 1])
                handles.append(self._prefixes.save_tail(view, name))
            saved += [handle for handle in handles if handle is not None]
        return saved

    def statistics(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Return the figures of the store, as `portakv.storage.BlockStore.statistics` does."""
        return self._prefixes.statistics()

    def close(self) -> None:
        """End the saves in progress and close the store."""
        self._prefixes.close()

    def _check(self, cache: DynamicCache) -> None:
        """Add the layers that an empty cache lacks; raise `LayoutError` for a cache of another
        model."""
        do = "Pass DynamicCache(config=model.config), or None."
        if self._tails is None:
            layers = layers_of(cache, do, len(self._layers))
            kinds_differ = False
        else:
            layers = cache.layers
            kinds_differ = any(
                not (type(layer) is each.kind or (each.kind is DynamicLayer and _is_own(layer)))
                for layer, each in zip(layers, self._layers, strict=False)
            )
        if len(layers) != len(self._layers) or kinds_differ:
            raise LayoutError(
                f"Expected a cache of the model's {len(self._layers)} layers, got one of "
                f"{len(layers)}{', or of other kinds' if kinds_differ else ''}. Make it with the "
                f"model's configuration."
            )

    def _empty(self, batch: int, tokens: int) -> Rows:
        """Return memory for rows of the layers that attend to all tokens."""
        made: Rows = []
        for layer, is_full in zip(self._layers, self._is_full, strict=True):
            if not is_full or layer.rows is None:
                continue
            keys, values = (
                torch.empty((batch, x.shape[1], tokens, x.shape[3]), dtype=x.dtype, device=x.device)
                for x in layer.rows
            )
            made.append((keys, values))
        return made


def _is_own(layer: object) -> bool:
    return type(layer) is PortaKVLayer


def _attends_to_all(layer: Layer) -> bool:
    """Return whether whole blocks of rows are all that a layer keeps."""
    return layer.rows is not None and layer.window is None and not layer.states


def _config_of(model: Any) -> Any:
    """Return a model's configuration, or raise `IntegrationError` for a model that is not served.

    Prefixes are equal only if a row depends on the tokens before it and on nothing else.
    """
    config = getattr(model, "config", None)
    if not hasattr(config, "get_text_config") or not callable(model):
        raise IntegrationError(
            f"Expected a model of transformers, got PrefixStore(model={model!r:.60}). Pass the "
            f"object whose generate() you call."
        )
    if getattr(config, "is_encoder_decoder", False):
        raise IntegrationError(
            f"Expected a decoder as model, got {kind_of(model)}, whose rows depend on its "
            f"encoder's input. Use OffloadedCache for it."
        )
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise IntegrationError(
            f"Expected a model with all of its heads, got {kind_of(model)} whose heads are "
            f"divided among {model.tp_size} processes. Load it without tp_plan."
        )
    assert config is not None
    by_length = [kind for kind in _rope_types(config.to_dict()) if kind in _BY_LENGTH]
    if by_length:
        raise IntegrationError(
            f"Expected a model whose rotary positions depend on no later token, got rope_type "
            f"{by_length[0]!r}, whose rows depend on the length of the prompt. Use OffloadedCache "
            f"for it."
        )
    return config


def _rope_types(config: Mapping[str, Any]) -> list[str]:
    """Return the kinds of rotary positions in a configuration and the configurations in it."""
    found = list[str]()
    for name, value in config.items():
        if name == "rope_type":
            found.append(str(value))
        elif isinstance(value, Mapping):
            found += _rope_types(value)
    return found


def _checksum_of(config: Any) -> str:
    """Return a checksum of a configuration, without the folder that it came from."""
    values = {name: x for name, x in config.to_dict().items() if name != "_name_or_path"}
    return sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


@torch.no_grad()
def _layers_of(model: Any) -> list[Layer]:
    """Return what the layers of a model keep of a token."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    do = (
        f"A prefix of {kind_of(model)} cannot be stored. Call generate() without a store; "
        f"OffloadedCache(config=model.config) takes such a model."
    )
    try:
        model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
        cache.get_seq_length()
    except (ValueError, TypeError, IndexError) as error:
        raise IntegrationError(
            f"Expected a model that runs with a DynamicCache, which counts its tokens, got "
            f"{kind_of(model)}: {error}. {do}"
        ) from error
    return layers_in(cache, do)


@torch.no_grad()
def _check_going_on(model: Any, tails: Tails) -> None:
    """Refuse a model that does not go on from a cache with several tokens at once, as from the
    prompt: it may drop its states, or have them outside of the cache.

    Raises `IntegrationError`.
    """
    name = cache_argument(model)
    count = model.config.get_text_config().vocab_size
    ids = torch.arange(1, 2 * TRIED + 1, device=model.device)[None] % count
    whole = DynamicCache(config=model.config)
    expected = _last_of(model(input_ids=ids, use_cache=True, **{name: whole}))
    begun = DynamicCache(config=model.config)
    model(input_ids=ids[:, :TRIED], use_cache=True, **{name: begun})
    cache = DynamicCache(config=model.config)
    blocks = TRIED // tails.size * tails.size
    both = zip(begun.layers, tails.layers, strict=True)
    rows = [_first(layer, blocks) if _is_full(each) and blocks else None for layer, each in both]
    tails.fill(cache, tails.of(begun, TRIED), TRIED, rows)
    other = DynamicCache(config=model.config)  # leaves its traces in a model that has states itself
    model(input_ids=ids.flip(1), use_cache=True, **{name: other})
    logits = _last_of(model(input_ids=ids[:, TRIED:], use_cache=True, **{name: cache}))
    error = (logits.float() - expected.float()).abs().max()
    if not error <= NEAR * expected.float().abs().max():
        raise IntegrationError(
            f"Expected a model that goes on from its cache with several tokens as from the whole "
            f"prompt, got {kind_of(model)} whose logits differ by {float(error):.3g}. Call "
            f"generate() without a store; OffloadedCache(config=model.config) takes such a model."
        )


def _last_of(output: Any) -> torch.Tensor:
    """Return what a model computes for the last token: logits, or hidden states without a head."""
    values = getattr(output, "logits", None)
    last: torch.Tensor = (output[0] if values is None else values)[:, -1]
    return last


def _is_full(layer: Layer) -> bool:
    return layer.rows is not None and layer.window is None


def _first(layer: Any, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of the first tokens in a layer."""
    keys, values = rows_on_device(layer)
    return keys[:, :, :tokens], values[:, :, :tokens]


def _prompts(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> Any:
    """Return the tokens of prompts on the host. Raises `InvalidTerms` for other objects, and for
    padding, after which rows have other positions."""
    good = isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2 and input_ids.numel() > 0
    if not good or input_ids.is_floating_point() or input_ids.is_complex():
        expected = "ids of tokens, a tensor [batch, tokens] of whole numbers"
        raise invalid("input_ids", expected, input_ids, "Pass those of the tokenizer.")
    if attention_mask is not None:
        is_mask = isinstance(attention_mask, torch.Tensor)
        if not is_mask or attention_mask.shape != input_ids.shape or not attention_mask.all():
            expected = f"ones of shape {[*input_ids.shape]}, as prompts have no padding, or None"
            do = "Pass prompts of one length, or one at a time."
            raise invalid("attention_mask", expected, attention_mask, do)
    return input_ids.detach().cpu().numpy()


def _pages(rows: Rows, number: int, size: int) -> KVView:
    """Return a paged view of one sequence's rows in blocks of ``size`` tokens."""
    pairs = [(keys[number], values[number]) for keys, values in rows]
    return KVView(pairs, _PAGES, block_size=size)
