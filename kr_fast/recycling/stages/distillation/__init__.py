"""The Student and its shadows, which learn from synthetic images."""
