"""Reading answers: numbers, arithmetic, LaTeX, and where in a text the answer stands."""
