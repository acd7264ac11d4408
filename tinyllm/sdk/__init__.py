"""The GPT4All surface."""
