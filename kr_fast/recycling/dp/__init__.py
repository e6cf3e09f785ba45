"""A run under differential privacy: private Teacher and generator, and what may leave without further noise."""
