"""Alerts about a run: message texts, rate limit, delivery and channels."""
