"""Activations on disk: npy, HDF5, Parquet and planted data, cut into row ranges."""
