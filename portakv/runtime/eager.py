# SPDX-License-Identifier: Apache-2.0
"""Run calls of compiled functions outside of their graphs, where a compiler cannot trace them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def eagerly(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Run a call of a compiled function outside of the graph, which breaks here.

    With ``fullgraph=True`` the compiler raises its error instead.
    """
    _make_outside()
    result: T = _outside(call, *arguments, **options)
    return result


_outside: Any = None  # a function that the compiler does not trace


def _make_outside() -> None:
    """Make ``_outside``. The compiler runs this function while it traces, and meets the result."""
    global _outside
    if _outside is None:
        why = (
            "PortaKV's op in a graph is a connector's transfer on the current stream, with slots "
            "in a tensor; it allocates and registers host memory outside of graphs"
        )
        _outside = torch.compiler.disable(_call, reason=why)


def _call(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    return call(*arguments, **options)


# What `torch.compiler.assume_constant_result` sets, without the import of the whole compiler,
# which takes longer than everything else that PortaKV does when it is imported.
setattr(_make_outside, "_dynamo_marked_constant", True)  # noqa: B010 - unknown to type checkers
