"""One module a stage, and what they share: environment, lineage, tracking, the frame around a stage, comparison."""
