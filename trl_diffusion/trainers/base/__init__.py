"""What the trainers of several methods share."""
