# SPDX-License-Identifier: Apache-2.0
"""The public path of `Fp8Plane`, which `portakv.layout.encodings` has."""

from portakv.layout.encodings import Fp8Plane as Fp8Plane
