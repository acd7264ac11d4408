"""The GPU backends: one kernel source in ``src``, run through CuPy (``cuda``) or PyOpenCL (``opencl``).

``common`` holds the operations, as launches of kernels; the two front ends add buffers, compilation and
launching. ``weights`` lays tensors out on the device, ``cache`` keeps the past of sequences in pages.
"""
