"""4×4 Sudoku in steps: puzzles, the order of their blanks, slips, and difficulties."""

from __future__ import annotations

import pytest

from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks.sudoku import solve_sudoku
from trl_diffusion.tasks.sudoku_steps import (
    PEERS,
    forced_order,
    format_reward,
    load_sudoku_steps,
    score,
    solved_reward,
)


def texts(rows) -> list[str]:
    return [row["completion"][0]["content"] for row in rows]


def lines(text: str) -> list[tuple[int, str]]:
    """The (cell, digit) of every line before the grid."""
    return [("abcd".index(line[0]) * 4 + int(line[1]) - 1, line[3]) for line in text.split("\n")[:-4]]


def test_a_row_by_hand():
    assert forced_order("1230341221434321") == [(3, "4")]
    row = next(row for row in load_sudoku_steps("train", 200, blanks=[2]) if row["puzzle"][0] == "0")
    first, second = lines(row["completion"][0]["content"])
    assert first[0] == 0 and row["solution"][0] == first[1] and row["solution"][second[0]] == second[1]
    board = "\n".join(f"{letter}{row['puzzle'][4 * at : 4 * at + 4]}" for at, letter in enumerate("abcd"))
    assert row["prompt"] == [{"role": "user", "content": board}]


def test_a_cell_has_seven_peers():
    assert PEERS[0] == [1, 2, 3, 4, 5, 8, 12] and PEERS[10] == [2, 6, 8, 9, 11, 14, 15]
    assert all(len(peers) == 7 for peers in PEERS)


def test_the_first_forced_blank_is_filled_first():
    assert forced_order("0" * 16) is None
    # The peers of a1 leave 1 and 3 until a2 holds 3.
    assert forced_order("0024241302404132") == [(1, "3"), (0, "1"), (8, "3"), (11, "1")]
    for row in load_sudoku_steps("train", 50, blanks=[8]):
        grid = list(row["puzzle"])
        for cell, digit in lines(row["completion"][0]["content"]):
            forced = {
                blank: set("1234") - {grid[peer] for peer in PEERS[blank]} for blank in range(16) if grid[blank] == "0"
            }
            assert cell == min(blank for blank, left in forced.items() if len(left) == 1)
            assert forced[cell] == {digit}
            grid[cell] = digit
        assert "".join(grid) == row["solution"]


def test_solutions_are_right_and_puzzles_have_one():
    rows = load_sudoku_steps("train", 200)
    assert solved_reward(texts(rows), rows["puzzle"]) == [1.0] * 200 == format_reward(texts(rows))
    for row in rows:
        assert solve_sudoku(row["puzzle"]) == [row["solution"]]
        assert row["difficulty"] == row["puzzle"].count("0") == len(lines(row["completion"][0]["content"]))
    assert set(rows["difficulty"]) == set(range(3, 9))


def test_a_slip_repeats_a_digit_and_stays_in_the_grid():
    clean, slipped = load_sudoku_steps("train", 300), load_sudoku_steps("train", 300, slips=True)
    assert clean["puzzle"] == slipped["puzzle"]
    for right, text, row in zip(texts(clean), texts(slipped), slipped, strict=True):
        wrong = [
            index for index, (a, b) in enumerate(zip(lines(right), lines(text), strict=True)) if a != b
        ]
        assert score(text, row)["puzzles_solved"] == float(not wrong)
        assert score(text, row)["format"] == 1.0
        assert all(lines(text)[index][1] == lines(text)[index - 1][1] for index in wrong)
    assert 0.1 < sum(solved_reward(texts(slipped), slipped["puzzle"])) / 300 < 0.4


def test_rows_depend_on_the_seed_alone_and_splits_share_no_puzzle():
    first, again, other = (load_sudoku_steps("train", 100, seed=seed).to_list() for seed in (1, 1, 2))
    assert first == again != other
    train, test = load_sudoku_steps("train", 1000, seed=1), load_sudoku_steps("test", 1000, seed=2)
    assert not set(train["puzzle"]) & set(test["puzzle"])


def test_numbers_of_blanks_are_drawn_as_often_as_they_are_given():
    rows = load_sudoku_steps("train", 600, blanks=(1, 8, 8))
    assert set(rows["difficulty"]) == {1, 8}
    assert sum(count == 8 for count in rows["difficulty"]) / 600 == pytest.approx(2 / 3, abs=0.06)


@pytest.mark.parametrize("blanks", [(), (0, 3), range(3, 10)])
def test_other_numbers_of_blanks_are_refused(blanks):
    with pytest.raises(ValueError, match="blanks must be numbers from 1 to 8, got"):
        load_sudoku_steps("train", 1, blanks=blanks)


def test_other_splits_sources_and_prompts_are_refused():
    task = TASKS["sudoku_steps"]
    with pytest.raises(ValueError, match="'validation'"):
        load_sudoku_steps("validation", 1)
    with pytest.raises(ValueError, match="reads no file, got source 'mine.csv'; the task sudoku does"):
        task.load("test", "mine.csv")
    with pytest.raises(ValueError, match="the prompt 'plain' only, got 'd1'"):
        task.load("test", prompt="d1")
