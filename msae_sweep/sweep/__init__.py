"""Runs a whole sweep: Ray Tune runs its trials, and ASHA stops trials early within each block."""
