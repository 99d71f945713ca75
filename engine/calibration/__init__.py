"""Quantized checkpoints made of dense ones, and what is measured of a model's inputs to make them better."""
