# SPDX-License-Identifier: Apache-2.0
"""Choose the backend that executes a copy, and record the decision on every candidate."""

from portakv.registry.prepared import bring as bring
from portakv.registry.prepared import prepare_by as prepare_by
from portakv.registry.registry import ENVIRONMENT as ENVIRONMENT
from portakv.registry.registry import MADE_FOR as MADE_FOR
from portakv.registry.registry import REGISTRY as REGISTRY
from portakv.registry.registry import STRATEGIES as STRATEGIES
from portakv.registry.registry import Choice as Choice
from portakv.registry.registry import available_device as available_device
from portakv.registry.registry import choose as choose
from portakv.registry.registry import trace as trace
