"""Tasks: data, prompts, rewards. One file per task."""
