"""Tasks with known answers: synthetic ones for any tokenizer, published ones, and those of the bundled model."""
