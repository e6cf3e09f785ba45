"""Training many models of one architecture."""
