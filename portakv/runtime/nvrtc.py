# SPDX-License-Identifier: Apache-2.0
"""Compile for NVIDIA devices at run time: NVRTC through ``cuda.bindings``, without a GPU or a
driver."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import SupportsInt

from portakv.runtime import kernel_cache

FLAGS = ("-std=c++17", "-default-device")
NEEDED = "pip install '.[cuda]' in a clone of PortaKV ('portakv[cuda]' once released)"


def missing() -> str | None:
    """Return why NVRTC 13 cannot be used, as a sentence; None if it can be."""
    try:
        installed = version("cuda-bindings")
    except PackageNotFoundError:
        return f"cuda-bindings is not installed; {NEEDED}"
    if installed.split(".")[0] != "13":
        return f"cuda-bindings {installed} is installed, but 13.x is needed; {NEEDED}"
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # a missing library raises whatever the loader raises
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        return f"NVRTC cannot be loaded ({why}); {NEEDED}"
    if int(status):
        return f"NVRTC does not report its version ({status}); {NEEDED}"
    if major != 13:
        return f"NVRTC {major}.{minor} is installed, but 13.x is needed; {NEEDED}"
    return None


def nvrtc_version() -> str:
    """Return the version of NVRTC, which decides the binary that it makes of a source text."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    try:
        return f"{major}.{minor} ({version('nvidia-cuda-nvrtc')})"
    except PackageNotFoundError:  # it came with a CUDA toolkit
        return f"{major}.{minor}"


def architectures() -> list[int]:
    """Return the architectures that NVRTC makes machine code for: 80 is compute capability 8.0."""
    from cuda.bindings import nvrtc

    _, count = nvrtc.nvrtcGetNumSupportedArchs()
    _, values = nvrtc.nvrtcGetSupportedArchs()
    return sorted(int(arch) for arch in values[:count])


def target_for(capability: int) -> str:
    """Return the target to compile for: machine code (``sm_90``), or PTX (``compute_90``).

    PTX is of the nearest older architecture, if NVRTC does not know the device's.

    Raises:
        RuntimeError: NVRTC knows no architecture that old.
    """
    known = architectures()
    if capability in known:
        return f"sm_{capability}"
    older = [arch for arch in known if arch < capability]
    if not older:
        raise RuntimeError(
            f"Expected compute capability {known[0] / 10} or later, which NVRTC {nvrtc_version()} "
            f"supports, got {capability / 10}. Use a newer device or another backend."
        )
    return f"compute_{older[-1]}"


def compile_kernel(source: str, capability: int) -> bytes:
    """Return the binary of a source text for a compute capability, cached on disk.

    Raises:
        RuntimeError: the compilation failed, with NVRTC's log; or as `target_for` raises it.
    """
    target = target_for(capability)
    return kernel_cache.cached(_key(source, target), lambda: compile_text(source, target))


def compiled_before(source: str, capability: int) -> bool:
    """Return True if the cache on disk has the binary of a text for a compute capability."""
    return kernel_cache.holds(_key(source, target_for(capability)))


def _key(source: str, target: str) -> tuple[str, ...]:
    return source, " ".join(FLAGS), target, nvrtc_version()


def compile_text(source: str, target: str) -> bytes:
    """Return the binary of a source text for a target, without the cache."""
    from cuda.bindings import nvrtc

    error, program = nvrtc.nvrtcCreateProgram(source.encode(), b"portakv_rows.cu", 0, [], [])
    _check(error, "Creating a program")
    try:
        options = [*FLAGS, f"--gpu-architecture={target}"]
        (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
        if int(error):
            log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog)
            text = log.decode(errors="replace").strip("\0 \n")
            raise RuntimeError(f"NVRTC refused the kernel for {target}:\n{text}")
        if target.startswith("sm_"):
            return _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN)
        return _read(program, nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(
    program: object,
    get_size: Callable[[object], tuple[SupportsInt, int]],
    read: Callable[[object, bytes], tuple[SupportsInt]],
) -> bytes:
    """Return a result of NVRTC for a program; text ends in a zero byte, as the driver requires."""
    error, size = get_size(program)
    _check(error, "Reading the size of a result")
    result: bytes = b" " * size  # NVRTC writes into it
    (error,) = read(program, result)
    _check(error, "Reading a result")
    return result


def _check(error: SupportsInt, what: str) -> None:
    if int(error):
        raise RuntimeError(f"{what} of NVRTC failed: {error}")
