"""Validation loss, HellaSwag and sampling."""
