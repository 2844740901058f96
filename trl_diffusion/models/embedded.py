"""The tiny models that ship with the package, for the demo, the tests and comparisons of methods, offline.

A LLaDA-architecture checkpoint, and an SDAR one for methods that need block-causal attention. Both are trained by
`recipes/make_embedded.py` on synthetic word problems, Countdown and 4×4 Sudoku. Many of their training solutions are
wrong on purpose, so that reinforcement learning has something to repair; they say nothing about large models.

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
"""

from pathlib import Path

EMBEDDED_MODEL = str(Path(__file__).with_suffix(""))
EMBEDDED_SDAR_MODEL = f"{EMBEDDED_MODEL}_sdar"
EMBEDDED_MODELS = {"embedded": EMBEDDED_MODEL, "embedded_sdar": EMBEDDED_SDAR_MODEL}  # by their names in recipes
