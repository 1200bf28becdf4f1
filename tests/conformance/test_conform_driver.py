# SPDX-License-Identifier: Apache-2.0
"""What a report says of a vendor's device: its name, its driver, the vendor's packages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from portakv.runtime import hip as _hip_driver
from portakv_conformance.evidence import driver
from portakv_conformance.evidence.driver import driver_version
from portakv_conformance.evidence.environment import (
    describe_environment,
    package_sha256,
    package_versions,
)
from portakv_conformance.judge.subject import subject

CUDA = torch.device("cuda", 0)
Write = Callable[[str, str], None]


def device(kind: str) -> Any:
    """A device of a type that torch knows only beside the vendor's package."""
    return SimpleNamespace(type=kind, index=0)


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """A machine without any driver's files or tools, and what writes such a file."""
    monkeypatch.setattr(driver, "_ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def write(name: str, text: str) -> None:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    return write


@pytest.fixture
def rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A torch for ROCm, without HIP's libraries."""

    def missing() -> None:
        raise _hip_driver.DriverMissing("the HIP runtime cannot be loaded")

    told = SimpleNamespace(name="", gcnArchName="gfx906:sramecc+:xnack-")
    monkeypatch.setattr(torch.version, "hip", "6.3.42134")
    monkeypatch.setattr(_hip_driver, "driver", missing)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: told)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: told.name)


NVIDIA_SMI = '#!/bin/sh\n[ "$1" = --query-gpu=driver_version ] && echo 580.159.04\n'


def test_nvidia(system: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", None)
    assert driver_version(CUDA) == ""
    system("bin/nvidia-smi", NVIDIA_SMI)
    assert driver_version(CUDA) == "580.159.04"
    system("bin/nvidia-smi", "#!/bin/sh\nexit 9\n")
    assert driver_version(CUDA) == ""


@pytest.mark.parametrize("module", ["amdgpu", "hydcu", "hycu"])
def test_the_kernel_module_of_amd_or_hygon(module: str, system: Write, rocm: None) -> None:
    system("bin/nvidia-smi", NVIDIA_SMI)  # which is about other devices
    assert driver_version(CUDA) == ""
    system(f"sys/module/{module}/version", "6.12.12\n")
    assert driver_version(CUDA) == f"{module} 6.12.12"


def test_hips_runtime_where_the_module_has_no_version(
    system: Write, rocm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of the Linux tree has none."""
    numbers = {"hipRuntimeGetVersion": 60342134}
    monkeypatch.setattr(_hip_driver, "driver", lambda: SimpleNamespace(number=numbers.__getitem__))
    assert driver_version(CUDA) == "HIP 6.3.42134"
    system("sys/module/amdgpu/version", "6.12.12\n")
    assert driver_version(CUDA) == "amdgpu 6.12.12"


def test_ascend(system: Write) -> None:
    assert driver_version(device("npu")) == ""
    system("usr/local/Ascend/driver/version.info", "ascendhal_version=7\nVersion=24.1.0\n")
    assert driver_version(device("npu")) == "24.1.0"
    assert driver_version(device("mlu")) == ""


def test_cambricon(system: Write) -> None:
    place = "proc/driver/cambricon/mlus/0000:0{}:00.0/information"
    assert driver_version(device("mlu")) == ""
    system(place.format(1), "Device name: MLU590\n")
    assert driver_version(device("mlu")) == ""
    system(place.format(2), "Device name: MLU590\nDriver Version: v5.10.29\n")
    assert driver_version(device("mlu")) == "v5.10.29"


def test_others_tell_nothing(system: Write) -> None:
    assert driver_version(torch.device("cpu")) == ""
    assert driver_version(device("xpu")) == ""


def test_another_vendor_s_extension_tells_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """R6 needs a driver of any accelerator, so any has to be able to say it."""
    told = SimpleNamespace(driver_version="5.2.1")
    extension = SimpleNamespace(get_device_properties=lambda device: told)
    monkeypatch.setattr(torch, "acme", extension, raising=False)
    assert driver_version(device("acme")) == "5.2.1"
    del told.driver_version
    assert driver_version(device("acme")) == ""
    del extension.get_device_properties
    assert driver_version(device("acme")) == ""


# The whole environment


def test_a_hip_device(system: Write, rocm: None, monkeypatch: pytest.MonkeyPatch) -> None:
    system("sys/module/hydcu/version", "5.16.29\n")
    on_it = replace(subject("reference", "cpu"), device=CUDA)
    facts = describe_environment(on_it, "cuda")
    told = {name: facts.get(name) for name in ("driver", "hip", "architecture", "cuda")}
    assert told == {
        "driver": "hydcu 5.16.29",
        "hip": "6.3.42134",
        "architecture": "gfx906:sramecc+:xnack-",
        "cuda": None,
    }
    assert facts["device_name"] == facts["architecture"], "some DCUs have no name"
    assert describe_environment(replace(on_it, emulated=True), "cuda")["driver"] == ""


def test_ascends_toolkit_is_asked_of_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    utils: Any = ModuleType("torch_npu.utils")
    utils.get_cann_version = lambda: "8.3.RC1"
    module = SimpleNamespace(get_device_name=lambda _: "Ascend910B1")
    monkeypatch.setattr(torch, "get_device_module", lambda _: module)
    on_it = replace(subject("reference", "cpu"), device=device("npu"))
    assert "cann" not in describe_environment(on_it, "npu")
    monkeypatch.setitem(sys.modules, "torch_npu.utils", utils)
    facts = describe_environment(on_it, "npu")
    assert (facts["cann"], facts["device_name"]) == ("8.3.RC1", "Ascend910B1")
    utils.get_cann_version = lambda: ""  # before 8.1
    assert "cann" not in describe_environment(on_it, "npu")


# The vendor's packages

RECORD = """\
../../../bin/torch_npu_run,sha256=of-this-machine,231
torch_npu-2.13.0.dist-info/INSTALLER,sha256=zuuue4,4
torch_npu-2.13.0.dist-info/RECORD,,
torch_npu/_C.so,sha256=CsK9HA,178729
torch_npu/__init__.py,sha256=wLHpGX,2617
torch_npu/__pycache__/__init__.cpython-311.pyc,,
"""


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The list of files of an installed torch_npu."""
    folder = tmp_path / "torch_npu-2.13.0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (folder / "RECORD").write_text(RECORD)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder / "RECORD"


def test_a_vendors_package_is_told_with_its_hash(record: Path) -> None:
    facts = describe_environment(subject("reference", "cpu"), "cpu")
    assert facts["torch-npu"] == "2.13.0"
    assert facts["sha256 of torch-npu"] == package_sha256("torch-npu")
    assert len(facts["sha256 of torch-npu"]) == 64
    assert "sha256 of torch-mlu" not in facts


def test_the_hash_is_that_of_the_build_not_of_the_installation(record: Path) -> None:
    before = package_sha256("torch-npu")
    lines = RECORD.replace("of-this-machine", "of-another").replace("zuuue4", "uv").splitlines()
    record.write_text("\n".join(reversed(lines)))
    assert package_sha256("torch-npu") == before
    record.write_text(RECORD.replace("CsK9HA", "another"))
    assert package_sha256("torch-npu") != before
    record.unlink()
    assert package_sha256("torch-npu") == ""


def test_a_package_that_was_put_there_without_an_installer(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("torch_mlu_ops")
    monkeypatch.setitem(sys.modules, "torch_mlu_ops", module)
    assert package_versions(["torch-mlu-ops"]) == {}
    module.__version__ = "1.3.2"
    assert package_versions(["torch-mlu-ops"]) == {"torch-mlu-ops": "1.3.2"}
    module.EMULATED = True  # a stand-in is no package of the vendor's
    assert package_versions(["torch-mlu-ops"]) == {}
