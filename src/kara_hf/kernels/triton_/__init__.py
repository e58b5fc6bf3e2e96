"""The ops as Triton kernels. Nothing here is imported unless a kernel runs; see `kara_hf.kernels.backend`."""
