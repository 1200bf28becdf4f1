# SPDX-License-Identifier: Apache-2.0
"""Right backends that claim less than others, and two that claim what they refuse: the controls of
the claims. Each copies as the base of all mutants does, which passes the suite."""

from __future__ import annotations

from typing import Any

import torch

from portakv import CopyPlan, Unsupported
from portakv.backends.base import Decision, Launch
from portakv.view.form import Form
from portakv_conformance.mutants.base import HostRows


def _narrow(name: str, **less: Any) -> Any:
    """Return a backend that claims less; its own check compares plans with its claims."""
    return type(name, (HostRows,), {"less": less, "__module__": __name__}, **less)


NoTables = _narrow("NoTables", tables=False)
Loops0 = _narrow("Loops0", max_loops=0)
Loops1 = _narrow("Loops1", max_loops=1)
Loops2 = _narrow("Loops2", max_loops=2)
Align4 = _narrow("Align4", alignment=4)
Align16 = _narrow("Align16", alignment=16)
Int32Only = _narrow("Int32Only", index_dtypes=frozenset({torch.int32}))
Int64Only = _narrow("Int64Only", index_dtypes=frozenset({torch.int64}))
NoSkip = _narrow("NoSkip", skips_negative=False)
NoGuards = _narrow("NoGuards", guards=False)
NoThreads = _narrow("NoThreads", threads=False)
OnlyPageable = _narrow("OnlyPageable", places=frozenset({("pageable", "pageable")}))
# Everything that can be left out, together.
Least = _narrow(
    "Least",
    tables=False,
    max_loops=0,
    alignment=16,
    skips_negative=False,
    guards=False,
    threads=False,
    **OnlyPageable.less,
    **Int64Only.less,
)
TrueAlignment = _narrow("TrueAlignment", alignment=True)
ListOfPlaces = _narrow("ListOfPlaces", places=[("pageable", "pageable")])


class _Declining(HostRows):
    """It declines some layouts by its check."""

    def why(self, plan: CopyPlan) -> str:
        return ""

    def check(self, plan: CopyPlan) -> Decision:
        why = self.why(plan)
        return Decision(self.name, False, why) if why else super().check(plan)


def _heads_first(form: Form) -> bool:
    return any(
        len(part.token) == len(part.head) == 1 and part.head[0].stride > part.token[0].stride > 0
        for part in form.parts
    )


class OnlyNHD(_Declining):
    def why(self, plan: CopyPlan) -> str:
        heads = _heads_first(plan.src) or _heads_first(plan.dst)
        return "caches with heads before tokens are not supported" if heads else ""


class OnlyHND(_Declining):
    def why(self, plan: CopyPlan) -> str:
        caches = [form for form in (plan.src, plan.dst) if form.paged and form.heads > 1]
        return "" if all(map(_heads_first, caches)) else "only caches as HND are supported"


class OnlyTuples(_Declining):
    def why(self, plan: CopyPlan) -> str:
        for form in (plan.src, plan.dst):
            one = form.kv == 2 and form.parts[0].table == form.parts[1].table
            if form.paged and one and form.layers > 1:
                return "only caches as tuples of keys and values are supported"
        return ""


class OnlyTuplesByPrepare(OnlyTuples):
    def check(self, plan: CopyPlan) -> Decision:
        return HostRows.check(self, plan)

    def prepare(self, plan: CopyPlan) -> Launch:
        if self.why(plan):
            raise Unsupported("This layout", self.why(plan))
        return super().prepare(plan)


class NoMigration(_Declining):
    def why(self, plan: CopyPlan) -> str:
        return "cache to cache is not supported" if plan.src.paged and plan.dst.paged else ""


class PartOfScatters(_Declining):
    """It declines scatters of narrow rows, and gathers them."""

    def why(self, plan: CopyPlan) -> str:
        small = plan.dst.layers < 2 and plan.dst.heads < 2
        odd = any(width % 16 for width in plan.dst.widths)
        scatter = plan.dst.paged and not plan.src.paged
        return "no scatter of such rows" if scatter and small and odd else ""


class RefusesFourLoops(_Declining):
    """It claims any number of loops, and declines every plan of more than three."""

    def why(self, plan: CopyPlan) -> str:
        return "too many loops for it" if any(len(n.loops) > 3 for n in plan.nests) else ""


class ClaimsFourLoops(RefusesFourLoops, max_loops=4):
    """It claims what it declines."""
