# SPDX-License-Identifier: Apache-2.0
"""Which driver a device runs under, as each vendor's system tells it. Reads files and asks tools.

Where the files come from: torch_npu's page on ``get_cann_version``; Cambricon's driver leaves
``Driver Version:`` in its information on each card; ``/sys/module`` has the version of AMD's kernel
module where it is not that of the Linux tree, and of Hygon's under either name that it had.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import torch

_ROOT = Path("/")
# By the type of device, a file and what stands around the version in it.
_FILES = {
    "npu": ("usr/local/Ascend/driver/version.info", r"^Version=(\S+)"),
    "mlu": ("proc/driver/cambricon/mlus/*/information", r"^Driver Version\s*:\s*(\S+)"),
}
_MODULES = ("amdgpu", "hydcu", "hycu")


def driver_version(device: torch.device) -> str:
    """The version of the driver of a real device; empty where the system does not tell it.

    Under HIP the kernel module's with its name, else that of the runtime, ``HIP 6.3.42134``. Of a
    device of another kind ``driver_version`` of its properties, which torch.xpu has, as torch's
    extension for it tells them.
    """
    if device.type in _FILES:
        return _told(*_FILES[device.type])
    if device.type != "cuda":
        ask = getattr(getattr(torch, device.type, None), "get_device_properties", None)
        with suppress(Exception):  # a vendor's code may fail in any way
            return "" if ask is None else str(getattr(ask(device), "driver_version", ""))
        return ""
    return _nvidia() if torch.version.hip is None else _module() or _hip()


def _told(pattern: str, around: str) -> str:
    for file in sorted(_ROOT.glob(pattern)):
        with suppress(OSError):
            found = re.search(around, file.read_text(encoding="utf-8"), re.MULTILINE)
            if found:
                return found.group(1)
    return ""


def _module() -> str:
    for name in _MODULES:
        version = _told(f"sys/module/{name}/version", r"(\S+)")
        if version:
            return f"{name} {version}"
    return ""


def _hip() -> str:
    from portakv.runtime.hip import DriverMissing, driver, hip_release

    try:
        return f"HIP {hip_release(driver().number('hipRuntimeGetVersion'))}"
    except (DriverMissing, RuntimeError):
        return ""


def _nvidia() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    try:
        told = subprocess.run(
            [tool, "--query-gpu=driver_version", "--format=csv,noheader"],
            capture_output=True, text=True, timeout=20, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = told.stdout.split()
    return lines[0] if lines else ""
