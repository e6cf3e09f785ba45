"""Shards of images on disk."""
