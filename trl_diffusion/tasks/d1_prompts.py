"""Writes the prompts of d1 (2504.12216), in its words: published tables were measured with them.

From github.com/dllm-reasoning/d1, Apache License 2.0. `d1` is the prompt of its evaluation, whose answer begins with
`<reasoning>`; `d1_train` is the one of its reinforcement learning, which has other words and no beginning.
"""

from __future__ import annotations

PLAIN, D1, D1_TRAIN = "plain", "d1", "d1_train"
NAMES = (PLAIN, D1, D1_TRAIN)

Prompt = list[dict[str, str]]

_TAGS = "<reasoning>\nYour reasoning here\n</reasoning>\n<answer>\n\\boxed{...}\n</answer>"
_TRAIN = "\nRespond in the following format:\n<reasoning>\n...\n</reasoning>\n<answer>\n...\n</answer>\n"

MATHS = (
    "You are a math expert. You will be given a question to solve. Solve it step by step. Wrap the final answer in a "
    "\\boxed{}. "
)
COUNTDOWN = (
    "Using only the provided numbers, create an arithmetic expression that evaluates to exactly the provided target "
    "number. You may use the operations +, -, *, and / as needed, but each number must be used exactly once. Think "
    "step-by-step. After reasoning, provide only your final expression inside \\boxed{} tags without including an "
    "equals sign or the target number. For example: \\boxed{a + b * c}"
)
SUDOKU = """
Please solve the following 4x4 Sudoku puzzle. The puzzle is provided as a 16-character string reading left-to-right, \
top-to-bottom, where '0' represents empty cells.

Rules:
- Fill empty cells with digits 1-4
- Each row must contain digits 1-4 exactly once
- Each column must contain digits 1-4 exactly once
- Each 2x2 box must contain digits 1-4 exactly once

Important: Your solution must be a COMPLETE 16-character string with only the digits 1-4, representing your final \
solved grid.

Respond in this exact format:
<reasoning>
Your step-by-step solving process
</reasoning>
<answer>
[16-character solution string with no spaces or separators]
</answer>
"""


def user(content: str) -> Prompt:
    """Return a prompt of one user message."""
    return [{"role": "user", "content": content}]


def _begun(content: str) -> Prompt:
    return [*user(content), {"role": "assistant", "content": "<reasoning>"}]


def gsm8k(question: str, name: str) -> Prompt:
    """Return d1's prompt for a GSM8K question."""
    if check(name) == D1_TRAIN:
        return user(f"{_TRAIN}\n\n{question}")
    return _begun(f"{MATHS}\nRespond in the following format:\n{_TAGS}\n\n{question}")


def math(problem: str, name: str) -> Prompt:
    """Return d1's prompt for a MATH problem."""
    if check(name) == D1_TRAIN:
        return user(f"{_TRAIN}\n\n{MATHS}\n\n{problem}")
    return gsm8k(problem, name)


def countdown(numbers: list[int], target: int, name: str) -> Prompt:
    """Return d1's prompt for a Countdown problem."""
    if check(name) == D1_TRAIN:
        return user(
            f"{_TRAIN}\nUsing only the numbers {numbers}, create an arithmetic expression that evaluates to exactly "
            f"{target}. You must use all numbers from the list, and each number must be used exactly once. You may "
            "use the operations +, -, *, and / as needed. After reasoning, provide only your final expression inside "
            "<answer></answer> tags without including an equals sign or the target number. For example, if the "
            "numbers are [2, 3, 4] and the target is 5, a valid answer is: <answer>\n2*4-3\n</answer>"
        )
    question = f"Numbers: {numbers}\nTarget: {target}"
    return _begun(f"{COUNTDOWN}Respond in the following format:\n{_TAGS}\n\n{question}")


def sudoku(puzzle: str, name: str) -> Prompt:
    """Return d1's prompt for a Sudoku."""
    content = f"{SUDOKU}\n\nSolve the following Sudoku puzzle: {puzzle}\n"
    return user(content) if check(name) == D1_TRAIN else _begun(content)


def check(name: str) -> str:
    """Return the name of a prompt, after a check that there is such a prompt.

    Raises:
        ValueError: if there is no such prompt.
    """
    if name not in NAMES:
        raise ValueError(f"No prompt is called {name!r}; there are {', '.join(map(repr, NAMES))}.")
    return name
