"""Activations to batches: sources, prepared shards, loaders."""
