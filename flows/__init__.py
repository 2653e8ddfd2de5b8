"""What a person starts or schedules; rlhf.py is the pipeline."""

import tasks  # noqa: F401  (sets the offline and no-telemetry switches, which Prefect reads when it is imported)
