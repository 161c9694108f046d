"""Evaluation: features of images, distances between their distributions, and the data's own statistics."""
