# SPDX-License-Identifier: Apache-2.0
"""Print escapes and ratios of keys and values of trained decoders that a package ships, as figures.

Run as ``python -m portakv_benchmarks.encodings.trained [FILE]``, with the package ``iglm`` on the
path (``pip install --no-deps iglm``). It ships the weights of two language models of antibodies
with the shape of GPT-2 (learned positions, no rotary ones). Its code does not run here: this
program reads the weights where they are installed, and computes the models by operations of torch
in float32. Each model writes 64 sequences of 128 tokens; their keys and values are rounded to
bf16. With FILE, `torch.save` writes them there, for `errors` and `ratios`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn.functional import gelu, layer_norm

from portakv.errors import Unsupported
from portakv.layout.encodings import Pack, slot_for
from portakv_benchmarks.encodings.ratios import exponents_of, planes_of, table

PACKAGE = "iglm"
MODELS = ("IgLM", "IgLM-S")
#: The tokens that each sequence begins with, of the package's vocabulary: a heavy chain of a human.
START = ("[HEAVY]", "[HUMAN]")
#: The tokens that the models draw from: amino acids.
LETTERS = range(5, 25)
SEQUENCES = 64
TOKENS = 128
BLOCKS = (16, 64)
Weights = Mapping[str, torch.Tensor]


class Shape(NamedTuple):
    """The numbers of a model."""

    layers: int
    heads: int


def folder_of(package: str = PACKAGE) -> Path:
    """Return the folder of an installed package; raise `ModuleNotFoundError` without it."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(
            f"Expected the package {package}, but it is not installed. Install it by pip with "
            f"--no-deps, or add its folder to PYTHONPATH."
        )
    return Path(spec.origin).parent / "trained_models"


def loaded(folder: Path, model: str) -> tuple[Weights, Shape]:
    """Return the weights of a model, and its numbers."""
    config = json.loads((folder / model / "config.json").read_text(encoding="utf-8"))
    path = folder / model / "pytorch_model.bin"
    weights: Weights = torch.load(path, map_location="cpu", weights_only=True)
    return weights, Shape(config["n_layer"], config["n_head"])


class Decoder:
    """A decoder with the shape of GPT-2, which keeps its keys and values.

    Attributes:
        keys, values: of each layer, ``[sequences, tokens, heads, dim]`` in float32.
    """

    def __init__(self, weights: Weights, shape: Shape) -> None:
        self.keys = list[torch.Tensor]()
        self.values = list[torch.Tensor]()
        self._weights = weights
        self._shape = shape

    def step(self, tokens: torch.Tensor, position: int) -> torch.Tensor:
        """Return the logits after one token of each sequence, ``[sequences, vocabulary]``."""
        words = self._weights["transformer.wte.weight"]
        hidden = words[tokens] + self._weights["transformer.wpe.weight"][position]
        for layer in range(self._shape.layers):
            name = f"transformer.h.{layer}"
            hidden = hidden + self._attention(layer, self._normed(hidden, f"{name}.ln_1"))
            inner = self._linear(self._normed(hidden, f"{name}.ln_2"), f"{name}.mlp.c_fc")
            hidden = hidden + self._linear(gelu(inner, approximate="tanh"), f"{name}.mlp.c_proj")
        return self._normed(hidden, "transformer.ln_f") @ words.T

    def _attention(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        made = self._linear(hidden, f"transformer.h.{layer}.attn.c_attn")
        query, key, value = (
            part.unflatten(1, (1, self._shape.heads, -1)) for part in made.chunk(3, dim=1)
        )
        for kept, new in ((self.keys, key), (self.values, value)):
            if layer == len(kept):
                kept.append(new)
            else:
                kept[layer] = torch.cat([kept[layer], new], dim=1)
        scores = torch.einsum("sqhd,sthd->sht", query, self.keys[layer]) / query.shape[-1] ** 0.5
        mixed = torch.einsum("sht,sthd->shd", scores.softmax(-1), self.values[layer])
        return self._linear(mixed.flatten(1), f"transformer.h.{layer}.attn.c_proj")

    def _linear(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        return hidden @ self._weights[f"{name}.weight"] + self._weights[f"{name}.bias"]

    def _normed(self, hidden: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = (self._weights[f"{name}.{kind}"] for kind in ("weight", "bias"))
        return layer_norm(hidden, hidden.shape[-1:], weight, bias)


def rows_of(folder: Path, model: str, sequences: int, tokens: int) -> dict[str, torch.Tensor]:
    """Return keys and values of each layer while a model writes, bf16 ``[tokens, heads, dim]``.

    The tokens of a sequence are together.
    """
    weights, shape = loaded(folder, model)
    words = (folder / "vocab.txt").read_text(encoding="utf-8").split()
    generator = torch.Generator(device="cpu").manual_seed(0)
    decoder = Decoder(weights, shape)
    for position, word in enumerate(START):
        same = torch.full((sequences,), words.index(word), dtype=torch.int64, device="cpu")
        logits = decoder.step(same, position)
    for position in range(len(START), tokens):
        shares = logits[:, LETTERS.start : LETTERS.stop].softmax(1)
        drawn = torch.multinomial(shares, 1, generator=generator).flatten()
        logits = decoder.step(drawn + LETTERS.start, position)
    named = dict[str, torch.Tensor]()
    for layer in range(shape.layers):
        for kind, kept in (("keys", decoder.keys), ("values", decoder.values)):
            named[f"{model}, {kind} of layer {layer}"] = kept[layer].flatten(0, 1).bfloat16()
    return named


def escapes_of(planes: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the escapes of each plane: values whose exponent has no code, if all values count."""
    exponents = exponents_of(planes).to(torch.int64)
    counts = torch.zeros((len(planes), 256), dtype=torch.int64, device=planes.device)
    counts.scatter_add_(1, exponents, torch.ones_like(exponents))
    frequent = counts.sort(1, descending=True).values[:, : (1 << bits) - 1].sum(1)
    return planes.shape[1] - frequent


def escape_lines(named: Mapping[str, torch.Tensor], kind: str, tokens: int) -> str:
    """Return the line of keys or values of all layers, in blocks of so many tokens."""
    some = [rows for name, rows in named.items() if f" {kind} " in name]
    planes = torch.cat([planes_of(rows, tokens) for rows in some])
    values = planes.shape[1]
    cells = [kind, f"{values:,}"]
    for bits in (4, 3):
        escapes = escapes_of(planes, bits)
        shares = 100 * escapes.double() / values
        cells.append(f"{shares.mean():.3f} %, {shares.quantile(0.99):.2f} %")
        try:
            plane = Pack(bits).plane(values)
        except Unsupported:
            cells += ["-", "-"]
            continue
        cells.append(f"{100 * (escapes <= plane.most_escapes).double().mean():.2f} %")
        most = int(escapes.double().quantile(0.999).ceil())
        cells.append(f"{2 * values / slot_for(values, bits, most):.3f}")
    return f"| {' | '.join(cells)} |"


def main(arguments: list[str]) -> None:
    """Print the tables, and write the rows to a file if one is named."""
    folder = folder_of()
    every = dict[str, torch.Tensor]()
    with torch.inference_mode():
        for model in MODELS:
            named = rows_of(folder, model, SEQUENCES, TOKENS)
            every |= named
            print(f"{model} of {PACKAGE} {version(PACKAGE)}, {SEQUENCES * TOKENS} tokens")
            head = "escapes, {} bits: mean, 99th percentile | planes that fit | raw / slot, 99.9 %"
            print(f"| | values | {' | '.join(head.format(bits) for bits in (4, 3))} |")
            print("|---|---:|" + "---|---:|---:|" * 2)
            for kind in ("keys", "values"):
                for tokens in BLOCKS:
                    print(escape_lines(named, kind, tokens))
            print()
    print("\n".join(table({name: rows for name, rows in every.items() if "layer 0" in name})))
    if arguments:
        torch.save(every, arguments[0])


if __name__ == "__main__":
    main(sys.argv[1:])
