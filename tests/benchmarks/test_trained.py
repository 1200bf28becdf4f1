# SPDX-License-Identifier: Apache-2.0
"""The decoder whose keys and values are measured computes what its equations say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention

from portakv_benchmarks.encodings import trained
from portakv_benchmarks.encodings.trained import Decoder, Shape, escapes_of, rows_of

LAYERS = 2
HEADS = 2
WIDTH = 32
WORDS = 33
TOKENS = 6


def weights_of() -> dict[str, torch.Tensor]:
    generator = torch.Generator(device="cpu").manual_seed(1)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu") / 4

    made = {
        "transformer.wte.weight": drawn(WORDS, WIDTH),
        "transformer.wpe.weight": drawn(8, WIDTH),
    }
    sizes = {"attn.c_attn": 3 * WIDTH, "attn.c_proj": WIDTH, "mlp.c_fc": 64, "mlp.c_proj": WIDTH}
    for layer in range(LAYERS):
        for name, size in sizes.items():
            inner = 64 if name == "mlp.c_proj" else WIDTH
            made[f"transformer.h.{layer}.{name}.weight"] = drawn(inner, size)
            made[f"transformer.h.{layer}.{name}.bias"] = drawn(size)
        for name in ("ln_1", "ln_2"):
            made[f"transformer.h.{layer}.{name}.weight"] = drawn(WIDTH)
            made[f"transformer.h.{layer}.{name}.bias"] = drawn(WIDTH)
    made["transformer.ln_f.weight"] = drawn(WIDTH)
    made["transformer.ln_f.bias"] = drawn(WIDTH)
    return made


def whole(weights: dict[str, torch.Tensor], tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return the logits of all tokens together, and the keys of the last layer."""

    def linear(hidden: torch.Tensor, name: str) -> torch.Tensor:
        return hidden @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def normed(hidden: torch.Tensor, name: str) -> torch.Tensor:
        return layer_norm(hidden, (WIDTH,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    words = weights["transformer.wte.weight"]
    hidden = words[tokens] + weights["transformer.wpe.weight"][: tokens.shape[1]]
    for layer in range(LAYERS):
        name = f"transformer.h.{layer}"
        made = linear(normed(hidden, f"{name}.ln_1"), f"{name}.attn.c_attn")
        parts = [x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in made.chunk(3, dim=2)]
        query, key, value = parts
        mixed = scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed = mixed.transpose(1, 2).flatten(2)
        hidden = hidden + linear(mixed, f"{name}.attn.c_proj")
        inner = gelu(linear(normed(hidden, f"{name}.ln_2"), f"{name}.mlp.c_fc"), approximate="tanh")
        hidden = hidden + linear(inner, f"{name}.mlp.c_proj")
    return normed(hidden, "transformer.ln_f") @ words.T, parts[1].transpose(1, 2)


def test_steps_compute_what_all_tokens_together_compute() -> None:
    weights = weights_of()
    tokens = torch.arange(2 * TOKENS, device="cpu").view(2, TOKENS) * 5 % WORDS
    decoder = Decoder(weights, Shape(LAYERS, HEADS))
    steps = [decoder.step(tokens[:, position], position) for position in range(TOKENS)]
    logits, keys = whole(weights, tokens)
    torch.testing.assert_close(torch.stack(steps, dim=1), logits)
    torch.testing.assert_close(decoder.keys[-1], keys)
    other = whole(weights, tokens.flip(1))[0]
    assert not torch.allclose(torch.stack(steps, dim=1), other)


def test_rows_are_those_of_each_sequence(tmp_path: Path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    config = {"n_layer": LAYERS, "n_head": HEADS}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save(weights_of(), folder / "pytorch_model.bin")
    words = [str(number) for number in range(WORDS - 2)] + [*trained.START]
    (tmp_path / "vocab.txt").write_text("\n".join(words), encoding="utf-8")
    named = rows_of(tmp_path, "tiny", 3, TOKENS)
    assert [*named] == [
        f"tiny, {x} of layer {n}" for n in range(LAYERS) for x in ("keys", "values")
    ]
    for rows in named.values():
        assert rows.shape == (3 * TOKENS, HEADS, WIDTH // HEADS)
        assert rows.dtype == torch.bfloat16
    keys = named["tiny, keys of layer 0"].view(3, TOKENS, HEADS, -1)
    assert torch.equal(keys[0, :2], keys[1, :2]), "all sequences begin alike"
    assert not torch.equal(keys[0], keys[1])


def test_escapes_are_what_the_most_frequent_exponents_leave() -> None:
    exponents = torch.tensor([[127] * 9 + [*range(100, 107)]], dtype=torch.int16, device="cpu")
    planes = exponents << 7
    assert escapes_of(planes, 3).tolist() == [1]
    assert escapes_of(planes, 4).tolist() == [0]


def test_without_the_package_the_error_names_it() -> None:
    with pytest.raises(ModuleNotFoundError, match="Expected the package no_such_package"):
        trained.folder_of("no_such_package")
