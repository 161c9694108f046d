"""The diffusion process: noise schedules, losses and their weights, samplers. Models enter as callables."""
