# SPDX-License-Identifier: Apache-2.0
"""Describe a run's environment: the backend and its source, the device, its driver, versions.

This module reads files and runs tools. It changes nothing, and imports no vendor package that is
not imported yet.
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
from portakv_conformance.record import ASSUMPTION, CARRIER, LIBRARY, JsonObject
from portakv_conformance.vendor import standins

ROOT = Path("/")
# For each type of device, a file and a pattern for the version in it. torch_npu's page on
# ``get_cann_version`` names the first file; Cambricon's driver writes the second for each card.
_FILES = {
    "npu": ("usr/local/Ascend/driver/version.info", r"^Version=(\S+)"),
    "mlu": ("proc/driver/cambricon/mlus/*/information", r"^Driver Version\s*:\s*(\S+)"),
}
# Names of AMD's and Hygon's kernel modules. The module of the Linux tree has no version.
_MODULES = ("amdgpu", "hydcu", "hycu")


def driver_version(device: torch.device) -> str:
    """Return the driver's version of a real device; empty if the system does not report it.

    Under HIP this is the kernel module's name and version, else the runtime's version, ``HIP
    6.3.42134``. Other devices report ``driver_version`` in the properties of torch's extension, as
    torch.xpu does.
    """
    if device.type in _FILES:
        return _version_in(*_FILES[device.type])
    if device.type == "cuda":
        return _nvidia() if torch.version.hip is None else _hip()
    properties_of = getattr(getattr(torch, device.type, None), "get_device_properties", None)
    if properties_of is None:
        return ""
    with suppress(Exception):  # a vendor's code may raise any exception
        return str(getattr(properties_of(device), "driver_version", ""))
    return ""


def _version_in(pattern: str, around: str) -> str:
    for file in sorted(ROOT.glob(pattern)):
        with suppress(OSError):
            if match := re.search(around, file.read_text(encoding="utf-8"), re.MULTILINE):
                return match.group(1)
    return ""


def _hip() -> str:
    from portakv.runtime.hip import DriverMissing, driver, hip_release

    for name in _MODULES:
        if version := _version_in(f"sys/module/{name}/version", r"(\S+)"):
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
# Distributions whose versions may explain a result, if they are installed.
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
# Distributions with a backend's ops. A version is not enough: vendors rebuild the same version.
_VENDORS = ("torch-npu", "torch-mlu", "torch-mlu-ops")


def describe_environment(subject: Subject, requested: str) -> JsonObject:
    """Return `RunRecord.environment`; ``requested`` is the device as the user wrote it."""
    device = subject.device
    facts: JsonObject = {
        "torch": str(torch.__version__),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "os": _system(),
        "device": requested,
        "device_name": device_name(device, subject.emulated),
        "driver": "" if subject.emulated else driver_version(device),
        "emulated": is_emulated(subject),
        "cores": len(os.sched_getaffinity(0)),
    }
    if subject.emulated:
        emulating = standins.emulating(device.type)
        facts["emulation"] = hashed(emulating)
        if assumption := assumed(emulating):
            facts[ASSUMPTION] = assumption
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
    """Return `RunRecord.backend`: name, target, version, source_sha256."""
    versions = package_versions(_distributions(subject.target))
    return {
        "name": subject.name,
        "target": subject.target,
        "version": next(iter(versions.values()), ""),
        "source_sha256": hashed([subject.target])[subject.target],
    }


def assumed(modules: Iterable[str]) -> str:
    """Return what modules that emulate assume without the vendor's confirmation.

    Each module's ``ASSUMPTION`` is a clause. The text is empty if no module has one.
    """
    assumptions = (str(getattr(import_module(module), "ASSUMPTION", "")) for module in modules)
    return "; ".join(clause for clause in assumptions if clause)


def hashed(modules: Iterable[str]) -> dict[str, str]:
    """Return each module's source hash, or why it is unknown; ``module:Class`` is accepted too."""
    hashes = {}
    for module in modules:
        try:
            hashes[module] = source_sha256(module)
        except SourceError as error:
            hashes[module] = f"unknown: {error}"
    return hashes


def plain(value: object) -> Any:
    """Return a claim as a JSON value: sets become sorted lists, dtypes and the like their names."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        entries = [plain(entry) for entry in value]
        return entries if isinstance(value, list | tuple) else sorted(entries, key=str)
    return str(value).removeprefix("torch.")


def is_emulated(subject: Subject) -> bool:
    """Return True if a simulated device or an interpreter took the place of the real device.

    A third party's backend that emulates sets ``emulated = True`` in its class.
    """
    return subject.emulated or interpreted(subject) or bool(subject.backend.emulated)


def interpreted(subject: Subject) -> bool:
    """Return True if Triton's interpreter runs the backend's kernels."""
    if os.environ.get(INTERPRET, "").lower() not in YES or subject.device.type != "cpu":
        return False
    reasons = [decision.reason for decision in subject.trace if decision.name == subject.name]
    ours = subject.target.partition(":")[0] == "portakv.backends.triton"
    return ours or "interpret" in " ".join(reasons)


def device_name(device: torch.device, simulated: bool) -> str:
    """Return the device's own name; for a CPU the processor's."""
    if simulated:
        simulation = f"simulated device ({device.type}, on the host's processor)"
        # An emulation below the vendor's own package has a separate name.
        return str(getattr(torch.get_device_module(device), "EMULATED_AS", simulation))
    if device.type == "cpu":
        return _processor()
    name_of = getattr(torch.get_device_module(device), "get_device_name", lambda device: "")
    return str(name_of(device)) or _architecture(device) or device.type


def _architecture(device: torch.device) -> str:
    """Return ``gfx906`` and the like under HIP, else an empty text."""
    if device.type != "cuda" or torch.version.hip is None:
        return ""
    return str(getattr(torch.cuda.get_device_properties(device), "gcnArchName", ""))


def _toolkit(device: torch.device) -> dict[str, str]:
    """Return the version of the vendor's toolkit that torch was built for, or that it loaded."""
    if device.type == "cuda":
        if torch.version.hip is None:
            return {"cuda": str(torch.version.cuda)}
        return {"hip": torch.version.hip, "architecture": _architecture(device)}
    cann_version = getattr(sys.modules.get("torch_npu.utils"), "get_cann_version", lambda: "")
    version = str(cann_version()) if device.type == "npu" else ""  # empty before CANN 8.1
    return {"cann": version} if version else {}


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Return the versions of installed distributions, and of modules without a distribution."""
    versions = {}
    for name in names:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            module = sys.modules.get(name.replace("-", "_"))
            emulated = getattr(module, "EMULATED", False)
            versions[name] = "" if emulated else str(getattr(module, "__version__", ""))
    return {name: version for name, version in versions.items() if version}


def package_sha256(name: str) -> str:
    """Return a hash of an installed distribution's files, computed from its wheel's file list.

    The hash is the same on each machine that has this wheel. It is empty without a wheel.
    """
    try:
        listed = metadata.distribution(name).read_text("RECORD") or ""
    except metadata.PackageNotFoundError:
        return ""
    # Leave out what an installer writes: its notes, scripts with its Python's path, compiled files.
    hashes = (line for line in listed.splitlines() if ",sha256=" in line)
    files = sorted(x for x in hashes if ".dist-info/" not in x and not x.startswith(".."))
    return hashlib.sha256("\n".join(files).encode()).hexdigest() if files else ""


def _distributions(target: str) -> list[str]:
    top = target.partition(":")[0].partition(".")[0]
    if top.startswith("portakv"):
        return ["portakv"]
    return sorted(set(metadata.packages_distributions().get(top, [])))


def _system() -> str:
    """Return the distribution, and the kernel without its builder's suffix."""
    kernel = ".".join(platform.release().split(".")[:2])
    system = f"{platform.system()} {kernel} {platform.machine()}"
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']}, {system}"
    except (OSError, KeyError):
        return system


def _processor() -> str:
    named = _version_in("proc/cpuinfo", r"^model name\s*:\s*(.+)$").strip()
    return named or platform.processor() or platform.machine()
