"""Sweeps of Matryoshka sparse autoencoders over a network's activations: Ray Data, Ray Tune with ASHA, MLflow."""

__version__ = "0.1.0"
