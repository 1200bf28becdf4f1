# SPDX-License-Identifier: Apache-2.0
"""What one copy between two forms needs: units, loops, vector width, runs."""

from portakv.plan.move import Move as Move
from portakv.plan.plan import CopyPlan as CopyPlan
