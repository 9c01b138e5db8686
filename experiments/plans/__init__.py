"""Training steps compiled ahead of time for pods."""
