# SPDX-License-Identifier: Apache-2.0
"""The row kernel for CUDA and HIP: `rows.cuh`.

It takes raw pointers and integers, includes no torch header, and builds under NVRTC, nvcc, hipRTC
and hipcc alike. Whatever lies here counts as source of the backends `cuda` and `hip`.
"""
