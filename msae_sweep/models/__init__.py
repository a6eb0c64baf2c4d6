"""One model: find it, evaluate it, export it, encode with it."""
