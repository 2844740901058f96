"""4×4 Sudoku in sweeps: puzzles, their grids, slips, and difficulties."""

from __future__ import annotations

import pytest

from trl_diffusion.tasks import TASKS
from trl_diffusion.tasks.sudoku import solve_sudoku
from trl_diffusion.tasks.sudoku_sweeps import (
    PEERS,
    format_reward,
    load_sudoku_sweeps,
    score,
    solve_in_sweeps,
    solved_reward,
)


def texts(rows) -> list[str]:
    return [row["completion"][0]["content"] for row in rows]


def grids(text: str) -> list[str]:
    return [board.replace("\n", "") for board in text.split("\n\n")]


def test_sweeps_by_hand():
    # The peers of a1 leave 1 and 3 until a2 holds 3.
    assert solve_in_sweeps("0024241302404132") == ["0324241332414132", "1324241332414132", "1324241332414132"]
    assert solve_in_sweeps("1234341221434321") == ["1234341221434321"] * 3
    assert solve_in_sweeps("0" * 16) is None


def test_a_cell_has_seven_peers():
    assert PEERS[0] == [1, 2, 3, 4, 5, 8, 12] and PEERS[10] == [2, 6, 8, 9, 11, 14, 15]
    assert all(len(peers) == 7 for peers in PEERS)


def test_solutions_are_right_and_puzzles_have_one():
    rows = load_sudoku_sweeps("train", 200)
    assert solved_reward(texts(rows), rows["puzzle"]) == [1.0] * 200 == format_reward(texts(rows))
    for row, text in zip(rows, texts(rows), strict=True):
        assert row["prompt"][0]["content"].replace("\n", "") == row["puzzle"]
        assert solve_sudoku(row["puzzle"]) == [row["solution"]]
        assert row["difficulty"] == row["puzzle"].count("0")
        assert grids(text) == solve_in_sweeps(row["puzzle"]) and grids(text)[-1] == row["solution"]
    assert set(rows["difficulty"]) == set(range(3, 10))


def test_only_the_last_grid_is_scored():
    row = {"puzzle": "0234341221434320", "solution": "1234341221434321"}
    right, wrong = "1234\n3412\n2143\n4321", "1234\n3412\n2143\n4323"
    assert score(f"{wrong}\n\n{wrong}\n\n{right}", row)["puzzles_solved"] == 1
    assert score(f"{right}\n\n{right}\n\n{wrong}", row)["puzzles_solved"] == 0


def test_a_slip_is_the_next_digit_and_later_grids_copy_it():
    clean, slipped = load_sudoku_sweeps("train", 300), load_sudoku_sweeps("train", 300, slips=True)
    assert clean["puzzle"] == slipped["puzzle"]
    blanks = wrong = 0
    for right, text, row in zip(texts(clean), texts(slipped), slipped, strict=True):
        assert score(text, row) == score(text, row) | {"puzzles_solved": float(right == text), "format": 1.0}
        blanks += row["difficulty"]
        for cell, digits in enumerate(zip(*grids(right), *grids(text), strict=True)):
            expected, found = digits[:3], digits[3:]
            if expected != found:
                wrong += 1
                assert row["puzzle"][cell] == "0"
                assert found == tuple(str(int(digit) % 4 + 1) if digit != "0" else "0" for digit in expected)
    assert wrong / blanks == pytest.approx(0.15, abs=0.03)


def test_rows_depend_on_the_seed_alone_and_splits_share_no_puzzle():
    first, again, other = (load_sudoku_sweeps("train", 100, seed=seed).to_list() for seed in (1, 1, 2))
    assert first == again != other
    train, test = load_sudoku_sweeps("train", 1000, seed=1), load_sudoku_sweeps("test", 1000, seed=2)
    assert not set(train["puzzle"]) & set(test["puzzle"])


def test_numbers_of_blanks_are_drawn_as_often_as_they_are_given():
    rows = load_sudoku_sweeps("train", 600, blanks=(1, 9, 9))
    assert set(rows["difficulty"]) == {1, 9}
    assert sum(count == 9 for count in rows["difficulty"]) / 600 == pytest.approx(2 / 3, abs=0.06)


@pytest.mark.parametrize("blanks", [(), (0, 3), range(3, 12)])
def test_other_numbers_of_blanks_are_refused(blanks):
    with pytest.raises(ValueError, match="blanks must be numbers from 1 to 10, got"):
        load_sudoku_sweeps("train", 1, blanks=blanks)


def test_other_splits_sources_and_prompts_are_refused():
    task = TASKS["sudoku_sweeps"]
    with pytest.raises(ValueError, match="'validation'"):
        load_sudoku_sweeps("validation", 1)
    with pytest.raises(ValueError, match=r"reads no file, got source 'mine\.csv'; the task sudoku does"):
        task.load("test", "mine.csv")
    with pytest.raises(ValueError, match="the prompt 'plain' only, got 'd1'"):
        task.load("test", prompt="d1")
