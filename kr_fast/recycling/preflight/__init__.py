"""Checks before the first stage of a run: what would fail later fails here, with nothing written."""

from kr_fast.recycling.preflight.checks import check
from kr_fast.recycling.preflight.division import larger
from kr_fast.recycling.preflight.dry_run import describe
from kr_fast.recycling.preflight.time_estimate import work

__all__ = ["check", "describe", "larger", "work"]
