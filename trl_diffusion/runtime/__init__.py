"""What every run has, whatever its method: start checks, launch, checkpoints, guards, cost, report, model card."""
