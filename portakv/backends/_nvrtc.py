# SPDX-License-Identifier: Apache-2.0
"""Compiling for NVIDIA at run time: NVRTC through cuda-core, without a GPU or a driver."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import _kernel_cache

FLAGS = ("-std=c++17", "-default-device")
NEEDED = "pip install 'portakv[cuda]'"


def missing() -> str | None:
    """What keeps NVRTC 13 from being used, as a sentence; None where it can be."""
    for package in ("cuda-core", "cuda-bindings"):
        try:
            found = version(package)
        except PackageNotFoundError:
            return f"{package} is not installed; {NEEDED}"
        if package == "cuda-bindings" and found.split(".")[0] != "13":
            return f"cuda-bindings {found} was found, but 13.x is needed; {NEEDED}"
    try:
        from cuda.bindings import nvrtc

        status, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # a missing library raises whatever the loader raises
        return f"NVRTC cannot be loaded ({error}); {NEEDED}"
    if int(status) or major != 13:
        return f"NVRTC {major}.{minor} was found, but 13.x is needed; {NEEDED}"
    return None


def nvrtc_version() -> str:
    """The version of NVRTC, which decides what it makes of a text."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor} {version('nvidia-cuda-nvrtc')}" if _has_wheel() else f"{major}.{minor}"


def _has_wheel() -> bool:
    try:
        version("nvidia-cuda-nvrtc")
    except PackageNotFoundError:
        return False
    return True


def architectures() -> list[int]:
    """The architectures that NVRTC makes machine code for: 80 is compute capability 8.0."""
    from cuda.bindings import nvrtc

    _, count = nvrtc.nvrtcGetNumSupportedArchs()
    _, found = nvrtc.nvrtcGetSupportedArchs()
    return sorted(int(arch) for arch in found[:count])


def compile_kernel(source: str, capability: int) -> bytes:
    """Machine code (cubin) for a compute capability; PTX where NVRTC does not know it yet.

    Cached on disk by source, flags, architecture and compiler version.

    Raises:
        RuntimeError: the text does not compile; with NVRTC's log.
    """
    known = architectures()
    if capability in known:
        target = f"sm_{capability}"
    else:
        older = [arch for arch in known if arch < capability]
        if not older:
            raise RuntimeError(
                f"NVRTC knows compute capabilities {known}, but the device has {capability}."
            )
        target = f"compute_{older[-1]}"
    key = (source, " ".join(FLAGS), target, nvrtc_version())
    return _kernel_cache.cached(key, lambda: _compile(source, target))


def _compile(source: str, target: str) -> bytes:
    # Only `cuda.bindings`: cuda-core asks the driver for PTX, and this must run without one.
    from cuda.bindings import nvrtc

    error, program = nvrtc.nvrtcCreateProgram(source.encode(), b"portakv_rows.cu", 0, [], [])
    _check(error, "nvrtcCreateProgram")
    options = [*FLAGS, f"--gpu-architecture={target}"]
    (error,) = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if int(error):
        _, size = nvrtc.nvrtcGetProgramLogSize(program)
        log = b" " * size
        nvrtc.nvrtcGetProgramLog(program, log)
        text = log.decode(errors="replace").strip("\0 \n")
        raise RuntimeError(f"NVRTC refused the kernel for {target}:\n{text}")
    machine_code = target.startswith("sm_")
    ask_size = nvrtc.nvrtcGetCUBINSize if machine_code else nvrtc.nvrtcGetPTXSize
    read = nvrtc.nvrtcGetCUBIN if machine_code else nvrtc.nvrtcGetPTX
    error, size = ask_size(program)
    _check(error, "Asking for the size of the compiled kernel")
    binary: bytes = b" " * size
    (error,) = read(program, binary)
    _check(error, "Reading the compiled kernel")
    nvrtc.nvrtcDestroyProgram(program)
    return binary


def _check(error: object, what: str) -> None:
    if int(error):  # type: ignore[call-overload]
        raise RuntimeError(f"{what} failed: {error}")
