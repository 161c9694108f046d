"""Trained models: opened from any folder that holds one, and exported as diffusers pipelines."""
