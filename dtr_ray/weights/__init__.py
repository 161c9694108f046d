"""Weights: the one place that finds pretrained networks, fetched once a machine and checked."""
