"""Cards of what leaves a run: Markdown with a YAML header, as the Hugging Face hub reads it."""
