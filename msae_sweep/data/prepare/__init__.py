"""Preparation of row ranges into standardised shards: split, statistics, and the Ray Data pipeline."""
