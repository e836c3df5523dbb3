"""Measure: ``python -m kvshare_sglang.bench --help`` lists the commands. Costs nothing to import."""
