"""PoD before a cache is used: which layers can share keys (explore), and teaching a model to do so (adapt)."""
