# SPDX-License-Identifier: Apache-2.0
"""Plan one copy between two forms: units, loops, vector width, runs."""

from portakv.plan.plan import CopyPlan as CopyPlan
from portakv.plan.plan import Move as Move
