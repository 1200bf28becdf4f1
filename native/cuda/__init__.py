# SPDX-License-Identifier: Apache-2.0
"""Where the CUDA sources will live; there are none yet.

Planned: ``*.cuh`` files that take raw pointers and integers, include no torch header, and build
under NVRTC, nvcc, hipRTC and hipcc alike. Until they exist no backend uses this folder.
"""
