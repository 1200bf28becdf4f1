# SPDX-License-Identifier: Apache-2.0
"""What a run was made with: the backend and its source, the device and its driver, versions.

Reads files and asks tools; changes nothing, and imports no vendor package that is not there yet.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import fields, is_dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch

from portakv_conformance.evidence.source import SourceError, source_sha256
from portakv_conformance.judge.subject import Subject
from portakv_conformance.record import ASSUMPTION, CARRIER, LIBRARY
from portakv_conformance.vendor import standins

ROOT = Path("/")
# By the type of device, a file and what stands around the version in it: torch_npu's page on
# ``get_cann_version`` names the first, Cambricon's driver leaves the second for each card.
_FILES = {
    "npu": ("usr/local/Ascend/driver/version.info", r"^Version=(\S+)"),
    "mlu": ("proc/driver/cambricon/mlus/*/information", r"^Driver Version\s*:\s*(\S+)"),
}
# Kernel modules, AMD's and Hygon's under either name; that of the Linux tree has no version.
_MODULES = ("amdgpu", "hydcu", "hycu")


def driver_version(device: torch.device) -> str:
    """The version of the driver of a real device; empty if the system does not tell it. Under HIP
    the kernel module's with its name, else that of the runtime, ``HIP 6.3.42134``. Of other kinds
    ``driver_version`` of the properties that torch's extension tells, as torch.xpu has."""
    if device.type in _FILES:
        return _told(*_FILES[device.type])
    if device.type == "cuda":
        return _nvidia() if torch.version.hip is None else _hip()
    ask = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    with suppress(Exception):  # a vendor's code may fail in any way
        return "" if ask is None else str(getattr(ask(device), "driver_version", ""))
    return ""


def _told(pattern: str, around: str) -> str:
    for file in sorted(ROOT.glob(pattern)):
        with suppress(OSError):
            if result := re.search(around, file.read_text(encoding="utf-8"), re.MULTILINE):
                return result.group(1)
    return ""


def _hip() -> str:
    from portakv.runtime.hip import DriverMissing, driver, hip_release

    for name in _MODULES:
        if version := _told(f"sys/module/{name}/version", r"(\S+)"):
            return f"{name} {version}"
    try:
        return f"HIP {hip_release(driver().number('hipRuntimeGetVersion'))}"
    except (DriverMissing, RuntimeError):
        return ""


def _nvidia() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return next(iter(done.stdout.split()), "")
    return ""


#: Environment variable under which Triton interprets its kernels on the host, and its values.
INTERPRET = "TRITON_INTERPRET"
YES = ("1", "true", "on", "yes")
# Distributions whose versions may explain a result, where they are installed.
_PACKAGES = (
    "portakv",
    "numpy",
    "pytest",
    "hypothesis",
    "triton",
    "triton-ascend",
    "pytorch-triton-rocm",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "torch-musa",
    "intel-extension-for-pytorch",
)
# Those whose ops are a backend: a version is not enough, since vendors build one more than once.
_VENDORS = ("torch-npu", "torch-mlu", "torch-mlu-ops")


def describe_environment(subject: Subject, asked: str) -> dict[str, Any]:
    """The facts of `RunRecord.environment`; ``asked`` is the device as the user wrote it."""
    device = subject.device
    facts: dict[str, Any] = {
        "torch": str(torch.__version__),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": _system(),
        "device": asked,
        "device_name": device_name(device, subject.emulated),
        "driver": "" if subject.emulated else driver_version(device),
        "emulated": is_emulated(subject),
        "cores": len(os.sched_getaffinity(0)),
    }
    if subject.emulated:
        emulating = standins.emulating(device.type)
        facts["emulation"] = hashed(emulating)
        facts |= {ASSUMPTION: reported} if (reported := assumed(emulating)) else {}
    else:
        facts |= _toolkit(device)
    if path := subject.backend.library:
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        facts[LIBRARY] = {Path(path).resolve().name: digest}
    if path or subject.backend.carrier:
        facts[CARRIER] = subject.backend.carrier
    if interpreted(subject):
        facts[INTERPRET] = os.environ[INTERPRET]
    facts |= package_versions([*_PACKAGES, *_VENDORS, *_distributions(subject.target)])
    digests = {f"sha256 of {name}": package_sha256(name) for name in _VENDORS}
    return facts | {name: digest for name, digest in digests.items() if digest}


def describe_backend(subject: Subject) -> dict[str, str]:
    """The facts of `RunRecord.backend`: name, target, version, source_sha256."""
    versions = package_versions(_distributions(subject.target))
    return {
        "name": subject.name,
        "target": subject.target,
        "version": next(iter(versions.values()), ""),
        "source_sha256": hashed([subject.target])[subject.target],
    }


def assumed(modules: Iterable[str]) -> str:
    """What modules that emulate take for true without the vendor's word: each one's ``ASSUMPTION``,
    a clause; empty if none takes anything."""
    reported = (str(getattr(import_module(module), "ASSUMPTION", "")) for module in modules)
    return "; ".join(clause for clause in reported if clause)


def hashed(modules: Iterable[str]) -> dict[str, str]:
    """The hash of the source of each module, or of ``module:Class``; else why it is unknown."""
    result = {}
    for module in modules:
        try:
            result[module] = source_sha256(module)
        except SourceError as error:
            result[module] = f"unknown: {error}"
    return result


def plain(value: Any) -> Any:
    """A claim as JSON can hold it: sets sorted into lists, dtypes and the like as their names."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(retained) for key, retained in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        entries = [plain(entry) for entry in value]
        return entries if isinstance(value, list | tuple) else sorted(entries, key=str)
    return str(value).removeprefix("torch.")


def is_emulated(subject: Subject) -> bool:
    """Whether less than the real device was at work: a simulated device, or an interpreter. A
    backend of a third party that emulates says so with ``emulated = True`` in its class."""
    return subject.emulated or interpreted(subject) or bool(subject.backend.emulated)


def interpreted(subject: Subject) -> bool:
    """Whether the backend's kernels run through Triton's interpreter."""
    if os.environ.get(INTERPRET, "").lower() not in YES or subject.device.type != "cpu":
        return False
    reported = [decision.reason for decision in subject.trace if decision.name == subject.name]
    ours = subject.target.partition(":")[0] == "portakv.backends.triton"
    return ours or "interpret" in " ".join(reported)


def device_name(device: torch.device, simulated: bool) -> str:
    """The device's own name; for a CPU the processor's."""
    if simulated:
        simulation = f"simulated device ({device.type}, on the host's processor)"
        # What emulates a vendor's device below the vendor's own package has a name of its own.
        return str(getattr(torch.get_device_module(device), "EMULATED_AS", simulation))
    if device.type == "cpu":
        return _processor()
    ask = getattr(torch.get_device_module(device), "get_device_name", lambda device: "")
    return str(ask(device)) or _architecture(device) or device.type


def _architecture(device: torch.device) -> str:
    """``gfx906`` and the like, under HIP."""
    if device.type != "cuda" or torch.version.hip is None:
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", ""))


def _toolkit(device: torch.device) -> dict[str, str]:
    """The version of the vendor's toolkit that torch was built for, or that lies beside it."""
    if device.type == "cuda":
        if torch.version.hip is None:
            return {"cuda": str(torch.version.cuda)}
        return {"hip": torch.version.hip, "architecture": _architecture(device)}
    ask = getattr(sys.modules.get("torch_npu.utils"), "get_cann_version", lambda: "")
    version = str(ask()) if device.type == "npu" else ""  # empty before CANN 8.1
    return {"cann": version} if version else {}


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of those distributions that are installed, and of modules without one."""
    result = {}
    for name in names:
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            module = sys.modules.get(name.replace("-", "_"))
            emulated = getattr(module, "EMULATED", False)
            result[name] = "" if emulated else str(getattr(module, "__version__", ""))
    return {name: version for name, version in result.items() if version}


def package_sha256(name: str) -> str:
    """A hash of the files of an installed distribution, by the list that its wheel brought along;
    the same wherever that wheel was installed. Empty if there is none."""
    try:
        listed = metadata.distribution(name).read_text("RECORD") or ""
    except metadata.PackageNotFoundError:
        return ""
    # Not what an installer writes: its own notes, scripts with its Python's path, compiled files.
    hashes = (line for line in listed.splitlines() if ",sha256=" in line)
    files = sorted(x for x in hashes if ".dist-info/" not in x and not x.startswith(".."))
    return hashlib.sha256("\n".join(files).encode()).hexdigest() if files else ""


def _distributions(target: str) -> list[str]:
    top = target.partition(":")[0].partition(".")[0]
    if top.startswith("portakv"):
        return ["portakv"]
    return sorted(set(metadata.packages_distributions().get(top, [])))


def _system() -> str:
    """The distribution, and the kernel without what its builder added to the version."""
    kernel = ".".join(platform.release().split(".")[:2])
    reported = f"{platform.system()} {kernel} {platform.machine()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {reported}"
    except (OSError, KeyError):
        return reported


def _processor() -> str:
    named = _told("proc/cpuinfo", r"^model name\s*:\s*(.+)$").strip()
    return named or platform.processor() or platform.machine()
