r"""Answers as networks write them, and whether the library's own protocol must take them for right.

    python tests/answer_cases.py

prints the table, with what the readers say today.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from trl_diffusion.tasks import TASKS


class Case(NamedTuple):
    """A completion and what it is worth.

    Args:
        task: the task that reads it.
        gold: the right answer; of Countdown numbers and target, of Sudoku the puzzle.
        text: the completion.
        right: its score.
    """

    task: str
    gold: Any
    text: str
    right: int

    @property
    def score(self) -> float:
        """The headline score under the library's own protocol."""
        keys = {"countdown": ("numbers", "target"), "sudoku": ("puzzle",)}.get(self.task, ("answer",))
        row = dict(zip(keys, self.gold if self.task == "countdown" else (self.gold,), strict=True))
        return next(iter(TASKS[self.task].score(self.text, row).values()))


def boxed(answer: str) -> str:
    return f"\\boxed{{{answer}}}"


def tagged(answer: str) -> str:
    return f"<answer>{answer}</answer>"


# For GSM8K and MATH, with the gold answer 18.
EIGHTEEN = (
    "#### **18**",
    "#### 18**",
    "**#### 18**",
    "*#### 18*",
    "#### `18`",
    "`#### 18`",
    "#### **Answer:** 18",
    "#### The final answer is **18**.",
    "#### Final Answer\n\n**18**",
    "<answer>**18**</answer>",
    "<answer>***18***</answer>",
    "<answer>*18*</answer>",
    "<answer>__18__</answer>",
    "<answer>\n```\n18\n```\n</answer>",
    "<answer>The answer is **18**.</answer>",
    "<answer>Answer: $18$</answer>",
    '<answer>"18"</answer>',
    "<answer>boxed{18}</answer>",
    "<answer>\\boxed{18></answer>",
    "\\boxed{**18**}",
    "**\\boxed{18}**",
    "\\boxed{18}\n\n#### Verification\n2 times 9 is 18, so the answer is right.",
    "\\boxed{18}\n\n#### **Step 2: Check**\n20 - 2 = 18",
    "\\boxed{18}\n\n#### 2. Check\n20 - 2 = 18",
    "#### 18\n\n#### Verification\n20 - 2 = 18",
    "<answer>18</answer>\n#### Note\nI used 3 steps.",
    "<answer>18</answer>\nThe final answer is inside the <answer> tags.",
    "<answer>18</answer>\nI put it inside `<answer>` tags.",
    "\\boxed{18}\nThe final answer is inside the <answer> tags.",
    "<answer>18</answer>\nI closed it with the </answer> tag.",
    "<answer>18</answer>\nIt stands between <answer> and </answer>.",
)
NOT_EIGHTEEN = (
    "#### 2**3",
    "#### **2**3**",
    "#### 18**2",
    "<answer>18</answer> no: <answer>17",
    "#### 18\n#### 17",
    "\\boxed{17}\n#### Verification\n18",
    "\\boxed{18K}",
    "\\boxed{18\\text{ thousand}}",
    "\\boxed{\\sqrt{18}}",
)
# Gold, answer in a box, right; for GSM8K.
NUMBERS = (
    ("2", "2:00 pm", 0),
    ("18", "18K", 0),
    ("18000", "18K", 1),
    ("1.8", "1.8 million", 0),
    ("1800000", "1.8 million", 1),
    ("5", "\\$5M", 0),
    ("5", "5 hundredths", 0),
    ("2", "2 and a half", 0),
    ("2.5", "2 and a half hours", 1),
    ("2", "2½", 0),
    ("2.5", "2½", 1),
    ("3", "minus 3", 0),
    ("-3", "negative 3", 1),
    ("36", "half of 36", 0),
    ("16", "\\sqrt{16}", 0),
    ("8", "2**3", 0),
    ("18", "3 x 6", 1),
    ("18", "18 kg", 1),
    ("18", "18 meters", 1),
    ("12", "12 dozen", 1),
)
# Gold, answer in a box, right; for MATH, and the same with gold and answer exchanged.
MATHS = (
    ("4", "4\\mathrm{i}", 0),
    ("4", "4\\text{x}", 0),
    ("-3", "-3\\text{i}", 0),
    ("x=5", "y=5", 0),
    ("x \\in [2,5)", "y \\in [2,5)", 0),
    ("12", "1 2", 0),
    ("12", "1\\,2", 0),
    ("12", "1\n2", 0),
    ("5", "5$ 6", 0),
    ("4210_{5}", "4210_{6}", 0),
    ("4210_{5}", "4210_{\\text{six}}", 0),
    ("4", "4\\sqrt(2)", 0),
    ("4", "4√2", 0),
    ("1/2^{99}", "1/2^{98}", 0),
    ("(1/2^{99}, 1)", "(1/2^{98}, 1)", 0),
    ("0.0000001", "10^{-8}", 0),
    ("1, 2, \\ldots, 10", "1, 2, \\ldots, 11", 0),
    ("1, 2, 3, \\ldots", "1, 2, 4, \\ldots", 0),
    ("1, 2, 3, \\ldots", "1, 2, 3", 0),
    ("0.\\overline{3}", "0.\\overline{6}", 0),
    ("5", "5\\text{ if }x > 0", 0),
    ("12", "12 xy", 0),
    ("1.8", "1.8\\text{ million}", 0),
    ("[2,5)", "2 < x < 5", 0),
    ("6-5i", "6+5i", 0),
    ("4i", "4\\mathrm{i}", 1),
    ("6-5i", "6-5\\,i", 1),
    ("6-5i", "-5\\,i + 6", 1),
    ("9500", "\\text{9,500}", 1),
    ("9500", "\\mathbf{9500}", 1),
    ("-\\frac{1}{2}", "\\mathbf{-\\frac{1}{2}}", 1),
    ("\\$32,348", "32,348 dollars", 1),
    ("32348", "\\$32{,}348", 1),
    ("[2,5)", "2 \\le x < 5", 1),
    ("[5,\\infty)", "x >= 5", 1),
    ("10000", "10 000", 1),
    ("4210_{5}", "4210_5", 1),
    ("4210_{5}", "4210\\text{ base }5", 1),
    ("4210_{5}", "4210", 1),
    ("4\\sqrt{2}", "4\\sqrt(2)", 1),
    ("4\\sqrt{2}", "4 sqrt(2)", 1),
    ("2\\pi", "2pi", 1),
    ("\\frac{1}{3}", "0.\\overline{3}", 1),
    ("\\frac{3}{2}", "1 1/2", 1),
    ("\\frac{1}{2}", "0.5 hours", 1),
    ("x^2+1", "x²+1", 1),
    ("1/2^{99}", "2^{-99}", 1),
    ("1, 2, \\ldots, 10", "1,2,...,10", 1),
    ("\\log_2 3", "\\log_{2}{3}", 1),
    ("1800000", "1.8\\text{ million}", 1),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}", 1),
)
# For Countdown with 3, 7, 25 → 46, between answer tags.
EXPRESSIONS = (
    ("`3*7+25`", 1),
    ("**3*7+25**", 1),
    ("**3*7**+25", 1),
    ("\\(3*7+25\\)", 1),
    ("\\[3*7+25\\]", 1),
    ("$3 \\times 7 + 25$", 1),
    ("3 x 7 + 25", 1),
    ("25+(3)X(7)", 1),
    ("3\\*7+25", 1),
    ("\n```\n3*7+25\n```\n", 1),
    ("```python\n3*7+25 = 46\n```", 1),
    ("Answer: 3*7+25", 1),
    ("= 3*7+25", 1),
    ("3*7+25 = 21+25 = 46", 1),
    ("\\boxed{3*7+25>", 1),
    ("boxed{3*7+25}", 1),
    ("3**7+25", 0),
    ("**3**7+25", 0),
    ("3 x + 7 + 25", 0),
    ("3*7*25", 0),
    ("21+25", 0),
    ("46", 0),
)

PUZZLE = "0234341221434320"
ROWS = ("1 2 3 4", "3 4 1 2", "2 1 4 3", "4 3 2 1")
CELLS = tuple(row.replace(" ", " | ") for row in ROWS)
WRONG = (*ROWS[:3], "4 3 1 2")


def lines(rows: tuple[str, ...], form: str = "{row}") -> str:
    return "\n".join(form.format(number=number, row=row) for number, row in enumerate(rows, start=1))


def table(heading: str, ruler: str, form: str) -> str:
    return "\n".join((heading, ruler, lines(CELLS, form)))


BOARDS = (
    ("\n".join((f"| {CELLS[0]} |", "|---|---|---|---|", *(f"| {row} |" for row in CELLS[1:]))), 1),
    (table("| A | B | C | D |", "|:-:|:-:|:-:|:-:|", "| {row} |"), 1),
    (table("| 1 | 2 | 3 | 4 |", "|---|---|---|---|", "| {row} |"), 1),
    (table("|   | 1 | 2 | 3 | 4 |", "|---|---|---|---|---|", "| {number} | {row} |"), 1),
    (table("|   | C1 | C2 | C3 | C4 |", "|---|---|---|---|---|", "| **R{number}** | {row} |"), 1),
    (lines(ROWS, "Row {number}: {row}"), 1),
    (lines(ROWS, "- **Row {number}:** [{row}]"), 1),
    (lines(ROWS, "{number}. {row}"), 1),
    (lines(tuple(row.replace(" ", "") for row in ROWS), "{number}) {row}"), 1),
    ("\n".join(f"{name} row: {row}" for name, row in zip(("First", "Second", "Third", "Last"), ROWS, strict=True)), 1),
    ("```\n" + lines(ROWS) + "\n```", 1),
    ("+---+---+\n|1 2|3 4|\n|3 4|1 2|\n+---+---+\n|2 1|4 3|\n|4 3|2 1|\n+---+---+", 1),
    ("│12 │34 │\n│34 │12 │\n├───┼───┤\n│21 │43 │\n│43 │21 │", 1),
    (" \\\\ ".join(row.replace(" ", " & ") for row in ROWS), 1),
    (lines(WRONG, "Row {number}: {row}") + "\n\n" + lines(ROWS, "Row {number}: {row}"), 1),
    (lines(ROWS, "Row {number}: {row}") + "\n\n" + lines(WRONG, "Row {number}: {row}"), 0),
    (lines(WRONG, "{number}. {row}"), 0),
    ("Row 2: 1 2 3 4\nRow 1: 3 4 1 2\nRow 3: 2 1 4 3\nRow 4: 4 3 2 1", 0),
    (lines(ROWS[:3], "Row {number}: {row}"), 0),
)

CASES = [
    *(Case(task, "18", text, 1) for task in ("gsm8k", "math500") for text in EIGHTEEN),
    *(Case(task, "18", text, 0) for task in ("gsm8k", "math500") for text in NOT_EIGHTEEN),
    *(Case(task, "8", "#### 2**3", 0) for task in ("gsm8k", "math500")),
    *(Case("gsm8k", gold, boxed(answer), right) for gold, answer, right in NUMBERS),
    Case("math500", "2", boxed("2:00 pm"), 0),
    Case("math500", "1.8", boxed("1.8 million"), 0),
    *(Case("math500", gold, boxed(answer), right) for gold, answer, right in MATHS),
    *(Case("math500", answer, boxed(gold), right) for gold, answer, right in MATHS),
    *(Case("countdown", ((3, 7, 25), 46), tagged(answer), right) for answer, right in EXPRESSIONS),
    Case("countdown", ((48, 29, 16), 93), tagged("\\boxed{48 + 29 + 16>"), 1),
    *(Case("sudoku", PUZZLE, text, right) for text, right in BOARDS),
    *(Case("sudoku", PUZZLE, tagged(f"\n{text}\n"), right) for text, right in BOARDS),
    Case("sudoku", PUZZLE, tagged("1234341221434321") + "\nIt stands inside the <answer> tags.", 1),
]


if __name__ == "__main__":
    print("| task | gold | completion | must be | is |", "|---|---|---|---|---|", sep="\n")
    for case in CASES:
        shown = repr(case.text)[1:-1].replace("\\\\", "\\").replace("|", "\\|")
        print(f"| {case.task} | `{case.gold}` | ``{shown}`` | {case.right} | {case.score:g} |")
