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
from portakv.serving import StoreTerms
from portakv.serving.local import checksum_of_tensors
from portakv.serving.prefixes import Prefixes, check_terms

check_release("transformers")

from transformers.cache_utils import DynamicCache, DynamicLayer  # noqa: E402

__all__ = ["PrefixStore"]

#: Keys and values of each layer, ``[batch, heads, tokens, dim]`` each.
Rows: TypeAlias = "list[tuple[torch.Tensor, torch.Tensor]]"
_PAGES = "layer kv | head (block token) dim"  # of one sequence
#: Kinds of rotary positions that depend on the length of the whole prompt.
_BY_LENGTH = ("dynamic", "longrope")


class PrefixStore:
    """The prefixes of a model's prompts in a store: on a disk, in a bucket, in host memory.

    A prefix is stored in blocks, each under a key of all tokens up to its end. Another process with
    the same model and terms loads it; one process at a time has a folder.

    A store that fails is not an error: what it lacks is computed, and the log has a line.

    Args:
        model: a decoder whose layers attend to all tokens. It runs once, for one token, whose rows
            fix the form of the blocks.
        terms: `portakv.serving.StoreTerms`, or a mapping of its names. ``block_size`` is 64 unless
            it is set; ``shared`` and ``by_layer`` are for engines.
        name: a name for the model. The form has a checksum of its configuration and of samples of
            its weights now anyway. After a change of the weights, make another store.

    Raises:
        IntegrationError: an object that is not a model with a configuration; a model with an
            encoder, or whose rotary positions depend on the length of the prompt.
        LayoutError: a layer that does not retain every token, or layers with different rows.
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
        self._probe = _rows_of_one_token(model)
        size = checked.block_size
        assert size is not None
        view = _pages(self._empty(1, size), 0, size)
        identity = (
            name or type(model).__name__,
            _checksum_of(config),
            checksum_of_tensors([*model.named_parameters(), *model.named_buffers()]),
        )
        self._prefixes = Prefixes(view, checked, ":".join(identity))

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
        prefix that all of its prompts have stored.

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
        layers = self._layers(cache)
        keys = [self._prefixes.keys(prompt[:-1], salt) for prompt in prompts]
        leading = min([self._prefixes.lookup(each) for each in keys], default=0)
        if leading:
            size = self._prefixes.block_size
            rows = self._empty(len(prompts), leading * size)
            landed = [
                self._prefixes.load(_pages(rows, number, size), each[:leading])
                for number, each in enumerate(keys)
            ]
            tokens = min(landed) * size
            if tokens:
                fill(layers, [[x[:, :, :tokens] for x in pair] for pair in rows])
                for layer in layers:
                    if isinstance(layer, PortaKVLayer):
                        layer.offload()
        return cache

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
        layers = self._layers(cache)
        size = self._prefixes.block_size
        whole = min(len(prompts[0]), cache.get_seq_length()) // size * size
        saved = list[Transfer]()
        if not whole:
            return saved
        # All on one device: in host memory if a layer is away.
        own = [layer for layer in layers if isinstance(layer, PortaKVLayer)]
        if len(own) == len(layers) and any(layer.is_away for layer in own):
            rows = [layer.rows() for layer in own]
        else:
            rows = [rows_on_device(layer) for layer in layers]
        batch = rows[0][0].shape[0]
        if batch != len(prompts):
            expected = f"ids of the {batch} prompts of the cache"
            raise invalid("input_ids", expected, input_ids, "Pass one row for each prompt.")
        cut = [(keys[:, :, :whole], values[:, :, :whole]) for keys, values in rows]
        for number, prompt in enumerate(prompts):
            keys = self._prefixes.keys(prompt[:whole], salt)
            handle = self._prefixes.save(_pages(cut, number, size), keys)
            if handle is not None:
                saved.append(handle)
        return saved

    def statistics(self) -> Mapping[str, Sequence[Mapping[str, Any]]]:
        """Return the figures of the store, as `portakv.storage.BlockStore.statistics` does."""
        return self._prefixes.statistics()

    def close(self) -> None:
        """End the saves in progress and close the store."""
        self._prefixes.close()

    def _layers(self, cache: DynamicCache) -> list[DynamicLayer]:
        """Return the layers of a cache for the model; add those that an empty cache lacks."""
        do = "Pass DynamicCache(config=model.config), or None."
        layers = layers_of(cache, do, len(self._probe))
        if len(layers) != len(self._probe):
            raise LayoutError(
                f"Expected a cache of the model's {len(self._probe)} layers, got one of "
                f"{len(layers)}. Make it with the model's configuration."
            )
        return layers

    def _empty(self, batch: int, tokens: int) -> Rows:
        """Return memory for rows of the model."""
        made: Rows = []
        for pair in self._probe:
            keys, values = (
                torch.empty((batch, x.shape[1], tokens, x.shape[3]), dtype=x.dtype, device=x.device)
                for x in pair
            )
            made.append((keys, values))
        return made


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
def _rows_of_one_token(model: Any) -> Rows:
    """Return the keys and values that a model computes for a token."""
    cache = DynamicCache(config=model.config)
    ids = torch.zeros((1, 1), dtype=torch.int64, device=model.device)
    model(input_ids=ids, use_cache=True, **{cache_argument(model): cache})
    do = (
        f"A prefix of {kind_of(model)} cannot be stored. Call generate() without a store; "
        f"OffloadedCache(config=model.config) takes such a model."
    )
    return [(layer.keys, layer.values) for layer in layers_of(cache, do)]


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
