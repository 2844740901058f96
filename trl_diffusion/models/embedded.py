"""The tiny model that ships with the package, for the demo, the tests and comparisons of methods, offline.

A LLaDA-architecture checkpoint trained by `recipes/make_embedded.py` on synthetic word problems, Countdown and 4×4
Sudoku. Many of its training solutions are wrong on purpose, so that reinforcement learning has something to repair;
it says nothing about large models.

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
"""

from pathlib import Path

EMBEDDED_MODEL = str(Path(__file__).with_suffix(""))
