"""Create a dataset from text: sources, cleaning, tokenization, shards."""
