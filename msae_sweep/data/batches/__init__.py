"""Shards to batches on the trial's device: resident, or streamed in windows."""
