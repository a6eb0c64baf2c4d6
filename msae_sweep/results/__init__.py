"""Finished sweeps: summary, tables, figures, model files."""
