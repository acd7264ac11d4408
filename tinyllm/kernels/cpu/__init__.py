"""The CPU backend: kernels written in Python, compiled by LLVM for the very processor they run on."""
