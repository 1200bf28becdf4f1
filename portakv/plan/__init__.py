# SPDX-License-Identifier: Apache-2.0
"""Plan one copy between two forms: units, loops, vector width, runs."""

from portakv.plan.move import Move as Move
from portakv.plan.plan import CopyPlan as CopyPlan
