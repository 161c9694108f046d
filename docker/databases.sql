-- Beside MLflow's records: its users, and Optuna's studies (storage.study).
CREATE DATABASE mlflow_auth;
CREATE DATABASE optuna;
