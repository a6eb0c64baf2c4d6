"""Matryoshka sparse autoencoders in plain torch: model, loss, metrics, training."""
