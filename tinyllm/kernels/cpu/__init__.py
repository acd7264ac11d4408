"""The CPU backend: kernels written in Python, compiled by numba for the very processor they run on."""
