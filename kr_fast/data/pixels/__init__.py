"""Pixels: images of files decoded, brought to 8 bit and to one size."""
