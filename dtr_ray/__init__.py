"""Distributed hyperparameter sweeps for denoising task routing (DTR)."""

__version__ = "0.1.0"
