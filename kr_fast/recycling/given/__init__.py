"""A generator of the user's in place of one that a run trains: a network, ready images or a function."""

from kr_fast.recycling.given.source import Source, applied, check, opened, run, work

__all__ = ["Source", "applied", "check", "opened", "run", "work"]
