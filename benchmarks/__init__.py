# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: backends on real models' shapes, against `copy_` of the same bytes in the same run.

Imported as ``portakv_benchmarks`` once installed, as ``benchmarks`` from the repository's root.
"""
