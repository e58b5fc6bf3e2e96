"""A page on which one sees a cache work: what it keeps of a text while that is generated, and what it drops."""
