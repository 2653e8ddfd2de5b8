"""What a person starts or schedules; rlhf.py is the pipeline."""
