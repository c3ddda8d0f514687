"""All targets, by name."""

from __future__ import annotations

from collections.abc import Mapping

import file_targets
import wire_targets
from outcome import Target

TARGETS: Mapping[str, Target] = {target.name: target for target in (*wire_targets.TARGETS, *file_targets.TARGETS)}
