"""What random streams are for: the first element of each one's key, so that no two purposes share noise."""

TRAIN_ROLLOUT, EVAL_ROLLOUT, TRAIN_VIEWS, EVAL_VIEWS, SELECTION, PROBE_STATE, PROBE_ROLLOUT, VIEW_COUNTS = range(8)
