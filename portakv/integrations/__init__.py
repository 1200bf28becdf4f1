# SPDX-License-Identifier: Apache-2.0
"""Plugs: PortaKV in the place of an engine's own transfers, chosen by the engine's configuration.

Importing this package imports no engine. An installed plug does nothing until it is asked for.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import NamedTuple

import portakv
from portakv.errors import PortaKVError

__all__ = ["MATRIX", "IntegrationError", "Releases", "check_release", "why_not"]


class IntegrationError(PortaKVError, RuntimeError):
    """A plug and the engine that asked for it do not fit: another release, or another device."""


class Releases(NamedTuple):
    """The releases of an engine that a plug is tested with: ``least`` and all below ``below``."""

    package: str
    least: str
    below: str

    def __str__(self) -> str:
        return f"{self.package} >= {self.least} and < {self.below}"


#: For each plug what it is tested with; `tests/integrations` runs the ends of each range.
MATRIX = {
    "lmcache": Releases("lmcache", "0.5.4", "0.6"),
    "sglang": Releases("sglang", "0.5.23", "0.6"),
    "transformers": Releases("transformers", "5.17", "5.24"),
    "vllm": Releases("vllm", "0.26", "0.34"),
}


def why_not(plug: str) -> str | None:
    """None if the engine of a plug is installed in a release that it serves; else why not, as a
    sentence that names both versions."""
    releases = MATRIX[plug]
    try:
        found = metadata.version(releases.package)
    except metadata.PackageNotFoundError:
        return (
            f"The plug {plug!r} of PortaKV {portakv.__version__} was asked for, but "
            f"{releases.package} is not installed; expected {releases}. Install it."
        )
    if _numbers(releases.least) <= _numbers(found) < _numbers(releases.below):
        return None
    return (
        f"The plug {plug!r} of PortaKV {portakv.__version__} was asked for beside "
        f"{releases.package} {found}; expected {releases}. Install one of these, or a release of "
        f"PortaKV that serves {releases.package} {found}."
    )


def check_release(plug: str) -> None:
    """Raise `IntegrationError` if the engine of a plug is missing, too old or too new."""
    if sentence := why_not(plug):
        raise IntegrationError(sentence)


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: a pre-release counts as its release."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(each) for each in found.group().split(".")) if found else ()
