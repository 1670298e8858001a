"""Ranks: how they are started, their device, and their collectives."""
