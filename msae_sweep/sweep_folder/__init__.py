"""Sweep folders: the files that a sweep writes and is resumed from, and atomic writes of them."""
