"""A Transformers `Cache` whose full-attention layers live in paged stores: steps, layers, compressions, caches."""
