# SPDX-License-Identifier: Apache-2.0
"""Sources of PortaKV's native kernels, shipped as text and compiled where they run.

Imported as ``portakv_native``. It holds no Python code of its own: `cuda` is for the CUDA and HIP
sources, `ascend` for the AscendC ones. Neither holds a source yet.
"""
