"""The harness of ``kr-fast bench``."""
