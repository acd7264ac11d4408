"""The GPU backends: one kernel source in ``src``, run through CuPy (``cuda``) or PyOpenCL (``opencl``).

``backend`` has the operations and chooses the kernels; the two front ends add memory, compilation and launches.
``weights`` lays tensors out on the device, ``kvcache`` keeps the past of sequences in pages.
"""
