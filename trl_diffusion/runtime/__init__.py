"""Parts of a run that do not depend on its method: checks at the start, checkpoints, guards, cost, report, card."""
