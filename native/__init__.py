# SPDX-License-Identifier: Apache-2.0
"""Sources of PortaKV's native kernels, shipped as text and compiled where they run.

Imported as ``portakv_native``. It holds no Python code of its own: `cuda` has the row kernel for
CUDA and HIP, `host` the kernels of small copies and of rows in host memory, `ascend` the row kernel
for AscendC.
"""
