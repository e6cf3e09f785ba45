"""Attacks, each a function from signals to scores."""
