"""Make a dataset: sources, cleaning, tokenization, shards."""
