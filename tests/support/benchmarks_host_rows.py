# SPDX-License-Identifier: Apache-2.0
"""Rows and results of the host benchmark for the tests of what is made of them."""

from __future__ import annotations

from typing import Any


def row(backend: str, time: float = 1.0, **more: Any) -> dict[str, Any]:
    engine = backend.split()[0]
    usual = {"kind": "host_copy", "shape": "s", "backend": backend, "engine": engine, "op": "d2h",
             "p50_us": time, "verified": True}  # fmt: skip
    return {**usual, **more}


def result(rows: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    machine = {"device_type": "cuda", "device": "Some GPU", "torch": "2.11", "python": "3.12",
               "date": "2026-11-20", "portakv": "0", "driver_version": "1"}  # fmt: skip
    return {"suite": "host", "name": "some-gpu-host", "machine": machine, "left_out": [],
            "asked": {"parts": ["grid"], "peers": {}}, "rows": rows, **more}  # fmt: skip
