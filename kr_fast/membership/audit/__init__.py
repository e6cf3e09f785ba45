"""The audit: load, query, score, report."""
