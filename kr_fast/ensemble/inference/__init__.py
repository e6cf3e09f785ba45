"""Asking many models of one architecture together."""
