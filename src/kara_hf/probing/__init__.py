"""What is done with a model before a cache: text is read, attention recorded."""
