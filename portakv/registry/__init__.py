# SPDX-License-Identifier: Apache-2.0
"""Which backend carries a copy out, with every candidate's answer on record."""

from portakv.registry.prepared import prepare
from portakv.registry.registry import (
    BUILT_IN,
    ENGINES,
    ENVIRONMENT,
    MADE_FOR,
    REGISTRY,
    Choice,
    Registry,
    choose,
    found,
    register_backend,
    trace,
)

__all__ = [
    "BUILT_IN",
    "ENGINES",
    "ENVIRONMENT",
    "MADE_FOR",
    "REGISTRY",
    "Choice",
    "Registry",
    "choose",
    "found",
    "prepare",
    "register_backend",
    "trace",
]
