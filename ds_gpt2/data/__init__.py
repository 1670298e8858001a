"""Token shards on disk, their verification, and the order in which training reads them."""
