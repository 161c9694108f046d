"""What a sweep tries next, whom it stops, what it remembers: Optuna and a journal, no Ray and no MLflow."""
