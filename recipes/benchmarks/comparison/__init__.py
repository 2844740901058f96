"""The comparison of methods at equal compute: its arms, its runs, and the summary of them."""
