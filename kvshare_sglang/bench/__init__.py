"""Measure: python -m kvshare_sglang.bench WHAT."""
