"""Readers of further kinds of sources, each of which returns a ``SourceContent``."""
