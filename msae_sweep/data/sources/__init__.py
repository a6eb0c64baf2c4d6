"""Readers of activations (npy, HDF5, Parquet and planted data), which cut each block into row ranges."""
