"""Extraction of activations from Go games and network weights: records, replay, planes, network, pipeline."""
