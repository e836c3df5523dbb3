"""Decide over plain views whether and how to reuse. Pure: touches nothing."""
