"""Ray Tune: trials, ASHA within a block, the whole sweep."""
