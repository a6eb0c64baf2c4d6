"""Row ranges to standardised shards: split, statistics, and the pipeline of Ray Data."""
