"""Launch environment, device and collectives of the ranks."""
