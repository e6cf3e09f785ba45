"""What an audit reads: logits, signals and files of other tools."""
