"""Launch the ranks, watch them, restart them after a failure, and send alerts."""
