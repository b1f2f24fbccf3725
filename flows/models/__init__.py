"""Models: base models come in and are checked, versions go out as plain Hugging Face folders."""
