"""The parts of a run that do not depend on its method: start checks, checkpoints, guards, cost, report, model card."""
