"""The learning itself: data, models, rollouts, losses and loops. Knows nothing of Prefect, DVC or MLflow."""
