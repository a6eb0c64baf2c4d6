"""The sweep folder: what a sweep writes, what it is resumed from, and how files get there whole."""
