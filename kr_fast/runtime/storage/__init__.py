"""Atomic files, journals, claims and manifests."""
