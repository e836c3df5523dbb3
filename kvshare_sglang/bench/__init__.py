"""Measure: ``python -m kvshare_sglang.bench --help`` lists the commands. Free to import."""
