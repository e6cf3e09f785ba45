"""A generator of the user's in place of one that a run trains: networks, ready images or functions."""

from kr_fast.recycling.given.source import STEP, Source, applied, check, opened, run, work

__all__ = ["STEP", "Source", "applied", "check", "opened", "run", "work"]
