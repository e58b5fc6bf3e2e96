"""The seam with Transformers: the attention and mask functions, attaching to a model, loading one."""
