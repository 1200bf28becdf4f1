# SPDX-License-Identifier: Apache-2.0
"""Stand-ins for vendors' packages on the simulated device, by the name that it carries."""

from __future__ import annotations

import os
from importlib import import_module

#: Names what emulates a device if that is not the simulated one, ``package.module:function``;
#: the vendor's jobs set it for the processes that they start. The function gets the device's name.
EMULATION = "PORTAKV_EMULATION"

#: The simulated device.
SIMULATION = "portakv_conformance.simdev"
#: For each name of the simulated device, the module whose ``install()`` puts the stand-in in place.
STANDINS = {
    "mlu": "portakv_conformance.vendor.mlu_standin",
    "npu": "portakv_conformance.vendor.ascend_standin",
}


def emulating(name: str) -> tuple[str, ...]:
    """Return the modules that emulate a device of that name.

    `source.source_files` starts from them. A report holds for these modules, and expires with them.
    """
    module = os.environ.get(EMULATION, "").partition(":")[0]
    if module:
        return (module,)
    return (SIMULATION, *([STANDINS[name]] if name in STANDINS else []))


def install(name: str) -> None:
    """Put the stand-in for a device name in place, if there is one; it leaves the vendor's own
    package alone if that is installed."""
    if name in STANDINS:
        import_module(STANDINS[name]).install()


def enter(name: str) -> bool:
    """Make a device known by what `EMULATION` names; return False if it names nothing."""
    module, _, function = os.environ.get(EMULATION, "").partition(":")
    if not module:
        return False
    getattr(import_module(module), function)(name)
    return True
