# SPDX-License-Identifier: Apache-2.0
"""Parts of blocks: those of ranks, and the whole blocks that a keeper stores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from portakv.arguments import shown
from portakv.errors import InvalidTerms
from portakv.storage.form import BlockForm


def whole_form(part: BlockForm) -> BlockForm:
    """Return the form of whole blocks, with all layers and heads, that a part belongs to."""
    layers = part.layers[2]
    heads = part.heads[2]
    return replace(part, layers=(0, layers, layers), heads=(0, heads, heads))


def cells_of(form: BlockForm) -> int:
    """Return a number with a bit for each head of each layer of a form, of those of the model."""
    across = form.heads[2]
    heads = sum(1 << head for head in range(*form.heads[:2]))
    return sum(heads << across * layer for layer in range(*form.layers[:2]))


def unlike(form: BlockForm, stored: Sequence[BlockForm]) -> InvalidTerms:
    """Return the error for blocks of another form than the stored ones."""
    got = asdict(form)
    nearest = min((asdict(each) for each in stored), key=partial(_differences, got), default={})
    names = [name for name in got if got[name] != nearest.get(name)]
    expected = ", ".join(f"{name}={shown(nearest.get(name))}" for name in names)
    values = ", ".join(f"{name}={shown(got[name])}" for name in names)
    return InvalidTerms(
        f"Expected blocks with {expected}, as the keeper stores them, got {values}. Start the "
        f"engine with the same terms, or give it another folder."
    )


def _differences(one: dict[str, Any], other: dict[str, Any]) -> int:
    return sum(one[name] != other[name] for name in one)
