"""A model class for lm-evaluation-harness, and the command that runs the harness with it."""
