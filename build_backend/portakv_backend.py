# SPDX-License-Identifier: Apache-2.0
"""Build PortaKV with setuptools, and its compiled core with the compiler that is there.

pyproject.toml names this module as the build backend. An environment variable,
``PORTAKV_CORE_TARGET=x86_64`` or ``aarch64``, makes the wheel of a release: `ziglang` builds its
core for any Linux with glibc 2.17 or later.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import compile_core
import setuptools
from setuptools import build_meta
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

Settings = dict[str, Any] | None

# The hooks that setuptools serves alone.
build_sdist = build_meta.build_sdist
get_requires_for_build_sdist = build_meta.get_requires_for_build_sdist
prepare_metadata_for_build_editable = build_meta.prepare_metadata_for_build_editable
prepare_metadata_for_build_wheel = build_meta.prepare_metadata_for_build_wheel

# The wheel holds a library for one platform, although setuptools knows of no extension module.
setuptools.Distribution.has_ext_modules = lambda self: True


def target() -> str:
    """Return the architecture of a release's wheel; empty: a wheel for this machine."""
    return os.environ.get("PORTAKV_CORE_TARGET", "")


class BuildPy(build_py):  # type: ignore[misc]  # setuptools has no types
    """Copy the modules, and compile the core next to them."""

    def run(self) -> None:
        """Fill the folder that becomes the wheel. `build_editable` serves an editable one."""
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib, "portakv", "core")
            compile_core.build(package / compile_core.LIBRARY.name, target())


class BdistWheel(bdist_wheel):  # type: ignore[misc]
    """Make a wheel for one platform and every Python, since the core reads no header of Python."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the three parts of the wheel's tag."""
        platform = super().get_tag()[2]
        if target():
            platform = f"manylinux_{compile_core.GLIBC.replace('.', '_')}_{target()}"
        return "py3", "none", platform


def get_requires_for_build_wheel(config_settings: Settings = None) -> list[str]:
    """Return what a wheel needs: ziglang for a release, or if this machine has no compiler."""
    needed: list[str] = build_meta.get_requires_for_build_wheel(config_settings)
    if target() or compile_core.compiler() is None:
        needed = [*needed, compile_core.ZIGLANG]
    return needed


def get_requires_for_build_editable(config_settings: Settings = None) -> list[str]:
    """Return what an editable installation needs: nothing to compile a core that is current."""
    needed: list[str] = build_meta.get_requires_for_build_editable(config_settings)
    if not compile_core.is_current() and compile_core.compiler() is None:
        needed = [*needed, compile_core.ZIGLANG]
    return needed


def build_wheel(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Build a wheel with the core, and return its name."""
    with one_sentence():
        name = build_meta.build_wheel(wheel_directory, config_settings, metadata_directory)
    return str(name)


def build_editable(
    wheel_directory: str,
    config_settings: Settings = None,
    metadata_directory: str | None = None,
) -> str:
    """Compile the core into the clone, unless it is current; return the editable wheel's name."""
    with one_sentence():
        if not compile_core.is_current():
            compile_core.build()
        name = build_meta.build_editable(wheel_directory, config_settings, metadata_directory)
    return str(name)


@contextmanager
def one_sentence() -> Iterator[None]:
    """End the process with the reason, without a traceback, if the core cannot be built."""
    try:
        yield
    except compile_core.CannotCompile as error:
        sys.exit(str(error))
