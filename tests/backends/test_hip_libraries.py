# SPDX-License-Identifier: Apache-2.0
"""Which libraries `hip` loads, and what it says where they are not there or are not HIP."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.hip_cases import CUDA, needs_compiler

from portakv.backends.hip import Hip
from portakv.runtime import hip as _hip_driver
from portakv_conformance.vendor.hip_fake import built


def reason() -> str:
    decision = Hip.probe(CUDA)
    assert not decision.accepted
    return decision.reason


@pytest.fixture
def libraries(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """Where libraries are looked for; nowhere."""
    places: dict[str, list[str]] = {}
    monkeypatch.setattr(_hip_driver, "_places", lambda stem, _=None: iter(places.get(stem, [])))
    monkeypatch.setattr(_hip_driver, "driver", _hip_driver.driver.__wrapped__)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    return places


def test_no_library(libraries: dict[str, list[str]]) -> None:
    libraries["amdhip64"] = ["/nowhere/libamdhip64.so.6"]
    why = reason()
    assert why.startswith("the HIP runtime cannot be loaded (/nowhere/libamdhip64.so.6: ")
    assert why.endswith("install ROCm for an AMD device, or load the environment of the DTK for a "
                        "Hygon DCU")  # fmt: skip


def test_a_library_that_is_not_hip(libraries: dict[str, list[str]]) -> None:
    libraries["amdhip64"] = libraries["hiprtc"] = ["libc.so.6"]
    assert reason() == (
        "libc.so.6 has no function hipGetDeviceCount; it is not a HIP that is known here"
    )


def test_a_runtime_without_hiprtc(libraries: dict[str, list[str]]) -> None:
    libraries["amdhip64"] = ["libc.so.6"]
    assert reason().startswith("hipRTC cannot be loaded (")


@needs_compiler
def test_the_runtime_of_the_dtk_with_hiprtc_in_it(
    libraries: dict[str, list[str]], tmp_path: Path
) -> None:
    """As `libgalaxyhip.so`, behind one that does not load; the compiler is in the runtime."""
    place = tmp_path / "libgalaxyhip.so.5"
    place.write_bytes(built())
    libraries["amdhip64"], libraries["galaxyhip"] = ["/nowhere/libamdhip64.so"], [str(place)]
    found = _hip_driver.driver()
    assert found.runtime is found.compiler
    assert found.error(100).startswith("hipErrorNoDevice (100)")


def test_a_loaded_library_is_preferred_then_one_beside(tmp_path: Path) -> None:
    """The C library stands for it: whatever torch loaded comes before every other copy."""
    places = list(_hip_driver._places("c"))
    assert Path(places[0]).name.startswith("libc.so")
    assert Path(places[0]).is_absolute()
    assert places[-4:] == ["libc.so", "libc.so.7", "libc.so.6", "libc.so.5"]
    (tmp_path / "libportakv_none.so.7").touch()
    beside = list(_hip_driver._places("portakv_none", tmp_path))
    assert beside[0] == str(tmp_path / "libportakv_none.so.7")


def test_importing_and_asking_it_load_no_library() -> None:
    """Where torch is not built for ROCm; in a process of its own."""
    program = (
        "import torch\n"
        "from portakv.backends.hip import Hip\n"
        "assert not Hip.probe(torch.device('cuda', 0)).accepted\n"
        "loaded = open('/proc/self/maps').read()\n"
        "assert not any(word in loaded for word in ('amdhip', 'hiprtc', 'galaxyhip'))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
