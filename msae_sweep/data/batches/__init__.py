"""Batches on the trial's device, made from shards: resident in its memory, or streamed in windows."""
