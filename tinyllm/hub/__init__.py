"""From a model's name to its file: GPT4All's list, Hugging Face, downloads."""
