"""Base classes of the methods' trainers."""
