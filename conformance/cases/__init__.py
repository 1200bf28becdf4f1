# SPDX-License-Identifier: Apache-2.0
"""The cases: what is asked of a backend. Each test's docstring is a sentence of the specification.

`test_core` is what every backend must do. The other files widen it: layouts and shapes
(`test_corners`, `test_presets`, `test_indices`, `test_parts`), what callers do (`test_connector`),
what must never happen (`test_safety`, `test_far`), what a backend claims (`test_claims`,
`test_lies`), order, devices and graphs (`test_ordering`, `test_devices`, `test_capture`), and
structures that nobody thought of (`test_drawn`, `test_metamorphic`, `test_stateful`).
"""
