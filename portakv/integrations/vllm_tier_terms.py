# SPDX-License-Identifier: Apache-2.0
"""The terms of PortaKV's secondary tier in a configuration of vLLM. No engine is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from portakv.arguments import text
from portakv.errors import InvalidTerms
from portakv.serving.local import StoreTerms, check_names, term_names
from portakv.serving.page_sizes import check_shared

#: Terms of `StoreTerms` that a tier of chunks does not have, and what to do.
OTHERS = {
    "block_size": "Leave it out.",
    "by_layer": "Leave it out.",
    "encoding": "Leave it out.",
}
#: The term that names what else fixes the bytes of chunks.
IDENTITY = "identity"


class TierTerms(NamedTuple):
    """The terms of a tier.

    Attributes:
        store: where chunks are stored.
        identity: what else fixes the bytes of chunks; chunks of another identity are not found.
    """

    store: StoreTerms
    identity: str


def tier_terms(terms: Mapping[str, Any]) -> TierTerms:
    """Return the terms of a tier, as a configuration has them.

    vLLM has a tier of host memory itself: ``host`` is 0 by default.

    Raises `InvalidTerms` for a term that a tier does not have, and for wrong values.
    """
    for name, advice in OTHERS.items():
        if name in terms:
            raise InvalidTerms(
                f"Expected the terms of a tier of whole chunks, got {name!r}. {advice}"
            )
    check_names(terms, [*term_names(OTHERS), IDENTITY])
    left = {"host": 0, **terms}
    identity = text(IDENTITY, left.pop(IDENTITY, ""), least=0, most=1 << 10)
    store = StoreTerms.of(left)
    if store.shared:
        check_shared(store)
    return TierTerms(store, identity)
