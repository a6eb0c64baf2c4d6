"""Everything between activations on disk and training batches: sources, prepared shards and loaders."""
