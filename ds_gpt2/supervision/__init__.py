"""Start the ranks, watch them, restart them, and send alerts."""
