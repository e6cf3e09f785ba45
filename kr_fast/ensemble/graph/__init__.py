"""A network as a graph: tracing, its architecture, its precision."""
