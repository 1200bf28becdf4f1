# SPDX-License-Identifier: Apache-2.0
"""Weights that other processes pull, in whatever sharding either side has."""

from portakv.weights.models import SharedModel, open_model, share_model
from portakv.weights.owner import Published, publish
from portakv.weights.parameters import Box, Parameter
from portakv.weights.pull import WeightsPull, count_weights, prepare_weights, pull_weights

__all__ = [
    "Box",
    "Parameter",
    "Published",
    "SharedModel",
    "WeightsPull",
    "count_weights",
    "open_model",
    "prepare_weights",
    "publish",
    "pull_weights",
    "share_model",
]
