"""Share, do not share, or not decided: what follows from the figures of an audit by rules that are fixed before."""
