"""A CUDA device for tests on machines that have none; README.md says what each part shows."""
