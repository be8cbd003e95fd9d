"""Metrics, statistics and comparisons of models on test images."""
