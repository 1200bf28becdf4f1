# SPDX-License-Identifier: Apache-2.0
"""Sources of PortaKV's native kernels, shipped as text and compiled where they run.

Imported as ``portakv_native``. It holds no Python code of its own: `cuda` has the source for CUDA
and HIP, `host` what stands behind it where a kernel reaches host memory, `ascend` the one for
AscendC.
"""
