# SPDX-License-Identifier: Apache-2.0
"""What a result was measured on: device, driver, processor, versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy
import torch

import portakv
from portakv.runtime import devices


def describe(device: torch.device) -> dict[str, Any]:
    """Facts of the machine and versions, as JSON can hold them."""
    facts: dict[str, Any] = {
        "date": f"{datetime.now(timezone.utc):%Y-%m-%d}", "device_type": device.type,
        "device": device_name(device), "cpu": cpu_name(),
        "cores": len(os.sched_getaffinity(0)), "torch_threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}", "python": platform.python_version(),
        "torch": torch.__version__, "numpy": numpy.__version__, "portakv": portakv.__version__,
    }  # fmt: skip
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["cuda"] = torch.version.cuda or torch.version.hip
        facts["multiprocessors"] = properties.multi_processor_count
        facts["l2_bytes"] = getattr(properties, "L2_cache_size", None)
        facts |= _smi(device)
    return facts


def device_name(device: torch.device) -> str:
    """The device's own name; for a CPU the processor's."""
    return cpu_name() if device.type == "cpu" else devices.device_name(device) or device.type


def short_name(device: torch.device) -> str:
    """A name for files that stays the same from run to run: ``cpu-2core``, ``h200``."""
    if device.type == "cpu":
        return f"cpu-{len(os.sched_getaffinity(0))}core"
    words = re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-").split("-")
    return "-".join(word for word in words if word not in ("nvidia", "amd", "instinct"))


def cpu_name() -> str:
    """The processor as the kernel names it."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found.group(1).strip() if found else platform.machine()


def _smi(device: torch.device) -> dict[str, str]:
    """Driver, clocks and power limit as nvidia-smi reads them; nothing is changed."""
    asked = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")
    command = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        line = told.stdout.splitlines()[device.index or 0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return {}
    return dict(zip(asked, (word.strip() for word in line.split(",")), strict=False))
