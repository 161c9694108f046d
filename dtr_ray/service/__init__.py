"""The sweep service: Ray Tune, Ray Train, Optuna and MLflow, which no other layer knows of."""
