"""Selectors: which reused rows of a request run again. Pure."""
