"""A time budget for a run: how it is divided among the stages, and the record of what was planned and spent."""
