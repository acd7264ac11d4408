"""Names of models become files: GPT4All's list, Hugging Face, downloads."""
