"""One module a stage, and what they share: environment, lineage, tracking, the frame around a stage, comparison."""

from tasks.environment import prepare_environment

# Before anything else is imported: huggingface_hub and others read the switches when they are loaded.
prepare_environment()
