"""A denoising that is shown is the one that was sampled: observer, frames, and the pictures made of them."""

from __future__ import annotations

import json
import time
from functools import cache
from html.parser import HTMLParser
from io import StringIO
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor
from rich.console import Console
from tiny import MASK, A, B, coded_prompts, forwards_of, set_bias, tiny_model, tiny_sdar, tiny_tokenizer
from transformers import AutoTokenizer

from trl_diffusion.family import DiffusionFamily, family_of
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.sampling import CanvasState, SamplingConfig, row_generators, sample
from trl_diffusion.viewing import Denoising, Kind, LiveView, picture, write_gif, write_page
from trl_diffusion.viewing.colours import colour, colour_of
from trl_diffusion.viewing.page import page_data
from trl_diffusion.viewing.pieces import INCOMPLETE, pieces, visible

LENGTH, BLOCK, STEPS, ROWS = 16, 4, 8, 12
SETTINGS = {
    "random": {},
    "low_confidence": {"unmasking": "low_confidence"},
    "parallel": {"unmasking": "max_prob", "confidence_threshold": 0.3, "denoising_steps": LENGTH},
    "dual cache": {"unmasking": "entropy", "cache": "dual"},
    "block-causal": {"temperature": 0.0, "unmasking": "max_prob"},
}


def config_of(case: str) -> SamplingConfig:
    return SamplingConfig(
        **{"canvas_length": LENGTH, "block_length": BLOCK, "denoising_steps": STEPS} | SETTINGS[case]
    )


@cache
def network(case: str = "random"):
    """A network that ends most texts within the canvas."""
    make = tiny_sdar if case == "block-causal" else tiny_model
    return set_bias(make(seed=3, max_position_embeddings=256), torch.tensor([-2.0, -2.0, 0.0, 0.0, 0.0]))


def rollout(case: str = "random", observer=None):
    """Completions of prompts of two very different lengths, which are sampled apart."""
    prompts, mask = (torch.nn.functional.pad(part, (100, 0)) for part in coded_prompts(ROWS))
    prompts[::2, :103], mask[::2, :103] = A, 1
    streams = row_generators(1, rows=range(ROWS))
    return sample(network(case), prompts, mask, config_of(case), streams, observer=observer)


def blank(row: int = 0, prompt: str = "a b", length: int = LENGTH, caption: str = "") -> Denoising:
    return Denoising(prompt, family_of(network()), tiny_tokenizer(), length, BLOCK, STEPS, caption, row)


# ---------------------------------------------------------------- the observer


@pytest.mark.parametrize("case", SETTINGS)
def test_an_observer_sees_every_token_and_changes_nothing(case):
    seen = []
    network(case)  # made from the global random state
    state = torch.get_rng_state(), np.random.get_state()[1].tolist()
    alone, observed = rollout(case), rollout(case, seen.append)
    assert torch.equal(state[0], torch.get_rng_state()) and state[1] == np.random.get_state()[1].tolist()
    for name, value in vars(alone).items():
        other = vars(observed)[name]
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, name

    written = torch.full_like(alone.unmask_step, -1)
    for commits in seen:
        where = commits.rows, commits.positions
        assert (written[where] == -1).all() and len(commits.rows)
        written[where] = commits.steps
        assert torch.equal(alone.completion_ids[where], commits.tokens)
        assert torch.equal(alone.logps[where], commits.logps)
    assert torch.equal(written, alone.unmask_step)
    parities = {tuple({row % 2 for row in commits.rows.tolist()}) for commits in seen}
    # Long and short prompts are sampled apart where every step computes the prompt.
    assert parities == ({(0, 1)} if case == "block-causal" else {(0,), (1,)})


# ---------------------------------------------------------------- frames


def test_a_frame_is_the_canvas_that_the_network_sees_next():
    prompts, _ = coded_prompts(4)
    model = network()
    for row in range(4):
        ids = prompts[row : row + 1, 3:]
        with forwards_of(model) as calls:
            trajectory = sample(model, ids, None, config_of("random"), row_generators(1, rows=[row]))
        denoising = blank().read(trajectory)
        saw = [call["input_ids"][0, ids.size(1) :].tolist() for call in calls]
        assert len(saw) == len(denoising.steps) > 2
        assert [denoising.canvas(step) for step in (-1, *denoising.steps)][:-1] == saw
        last = torch.tensor(denoising.canvas(denoising.steps[-1]))
        assert torch.equal(last[last != MASK], trajectory.completion_ids[0, last != MASK])


@pytest.mark.parametrize("case", SETTINGS)
def test_frames_while_sampling_are_those_of_the_trajectory(case):
    live = [blank(row) for row in range(ROWS)]
    frames = [[] for _ in range(ROWS)]

    def observe(commits):
        for row in {*commits.rows.tolist()}:
            live[row].write(commits)
            frames[row].append(live[row].frame(max(live[row].unmask_step)))

    trajectory = rollout(case, observe)
    for row in range(ROWS):
        recorded = blank(row).read(trajectory)
        for before, after in zip(frames[row], recorded.frames()[1:], strict=True):
            finished = tuple(
                cell if cell.kind is not Kind.UNUSED else old
                for cell, old in zip(after.cells, before.cells, strict=True)
            )
            assert before.step == after.step
            assert [cell[:3] for cell in before.cells] == [cell[:3] for cell in finished]
            confidences = [[cell.confidence for cell in cells] for cells in (before.cells, finished)]
            assert confidences[0] == pytest.approx(confidences[1], abs=1e-6)


@pytest.mark.parametrize("case", SETTINGS)
def test_every_token_appears_at_its_own_step_block_after_block(case):
    trajectory = rollout(case)
    for row in range(ROWS):
        frames = blank(row).read(trajectory).frames()
        words = tiny_tokenizer().convert_ids_to_tokens(trajectory.completion_ids[row].tolist())
        ends = [place for place, word in enumerate(words) if word in ("<end>", "<tail>")]
        for frame in frames:
            shown = [cell.kind in (Kind.WRITTEN, Kind.AFTER_END) for cell in frame.cells]
            assert shown == [0 <= step <= frame.step for step in trajectory.unmask_step[row].tolist()]
            blocks = [shown[start : start + BLOCK] for start in range(0, LENGTH, BLOCK)]
            active = next((number for number, block in enumerate(blocks) if not all(block)), len(blocks))
            assert not any(any(block) for block in blocks[active + 1 :])
            over = frame is frames[-1]
            for place, (cell, written) in enumerate(zip(frame.cells, shown, strict=True)):
                if written:
                    assert cell.text.strip() == ("∎" if place in ends else words[place])
                    assert cell.step == trajectory.unmask_step[row, place]
                    assert cell.confidence == pytest.approx(float(trajectory.logps[row, place].exp()))
                    cut = any(end < place and shown[end] for end in ends)
                    assert cell.kind is (Kind.AFTER_END if cut else Kind.WRITTEN)
                else:
                    kind = Kind.MASKED if place // BLOCK == active else Kind.WAITING
                    assert cell == ((Kind.UNUSED, "·") if over else (kind, "░")) + (-1, 0.0)


def test_given_text_stands_there_from_the_start():
    family = family_of(network())
    state = CanvasState.empty(1, LENGTH, MASK, torch.device("cpu"))
    state.canvas[0, :3] = torch.tensor([A, B, A])
    prompts, _ = coded_prompts(1)
    trajectory = sample(network(), prompts, None, config_of("random"), row_generators(1, rows=[0]), state=state)
    start, *_, last = blank().read(trajectory).frames()
    assert [cell.kind for cell in start.cells[:4]] == [Kind.GIVEN] * 3 + [Kind.MASKED]
    assert [cell.text for cell in last.cells[:3]] == ["a", " b", " a"] and family.mask_token_id == MASK


# ---------------------------------------------------------------- text


@pytest.mark.parametrize("text", ["7 + 5 = 12\n#### 12", "naïve 日本語 🙂🙂 x\t\n\n  y", "é"])
def test_pieces_of_bytes_make_the_text(text):
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def decode(group):
        return tokenizer.decode(list(group))

    found = pieces(ids, decode)
    assert len(found) == len(ids) and "".join(found) == text
    if not text.isascii():
        assert len(ids) > len(text) and "" in found
    # Where a token is missing, a part of a character is shown as such, and the rest as it is.
    (first, *rest) = pieces(ids[1:], decode)
    assert INCOMPLETE in first if text == "é" else "".join(rest) in text


def test_pieces_keep_what_a_decoder_puts_between_tokens():
    assert pieces([A, B, B], lambda ids: tiny_tokenizer().decode(list(ids))) == ["a", " b", " b"]


def test_nothing_shown_can_move_the_cursor_or_turn_the_text():
    everything = "".join(map(chr, range(0x100))) + "\u202e\u2066\u200d"
    shown = visible(everything)
    assert not {ord(character) for character in shown} & ({*range(32)} - {10} | {*range(0x7F, 0xA0), 0x202E, 0x2066})
    assert "↵\n" in shown and "⇥" in shown and "␛" in shown and "~" in shown and "\u200d" in shown


# ---------------------------------------------------------------- pictures


def sampled_row() -> Denoising:
    """A completion that ends early, with tokens after its end and unused positions."""
    trajectory = rollout()
    for row in range(ROWS):
        denoising = blank(row, "How many <b>pens</b>\n& why?", caption="tiny </script>").read(trajectory)
        if {cell.kind for cell in denoising.frames()[-1].cells} == {Kind.WRITTEN, Kind.AFTER_END, Kind.UNUSED}:
            return denoising
    raise AssertionError("no row ends early; choose another seed")


def terminal() -> Console:
    return Console(file=StringIO(), force_terminal=True, color_system="truecolor", width=60)


def test_the_terminal_shows_each_step_when_it_happens(monkeypatch):
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    console, prompts = terminal(), coded_prompts(1)[0]
    with LiveView(blank(), console, "step", delay=7.0) as view:
        trajectory = sample(network(), prompts, None, config_of("random"), row_generators(1, rows=[0]), observer=view)
        view.finish(trajectory)
    drawn = console.file.getvalue()
    assert len(slept) == len(view.denoising.steps) and all(6 < seconds <= 7 for seconds in slept)
    for step in view.denoising.steps:
        assert f"{step + 1} of {STEPS} steps" in drawn
    assert drawn.index("░") < drawn.index("1 of 8 steps")


@pytest.mark.parametrize("by", ["step", "confidence"])
def test_the_terminal_colours_tokens_and_dims_what_is_cut(by):
    denoising, console = sampled_row(), terminal()
    console.print(picture(denoising, denoising.steps[-1], by))
    drawn = console.file.getvalue()
    cells = denoising.frames()[-1].cells
    for cell in cells:
        if cell.kind is Kind.WRITTEN:
            red, green, blue = ImageColor.getrgb(colour_of(cell, by, denoising.num_steps).fill)
            assert f"48;2;{red};{green};{blue}m{cell.text}" in drawn
    assert drawn.count("\x1b[2m∎") + drawn.count("\x1b[2m a") + drawn.count("\x1b[2m b") >= 1
    assert drawn.count("·") == sum(cell.kind is Kind.UNUSED for cell in cells)


def test_a_gif_shows_each_token_from_its_step_on(tmp_path):
    denoising, path = sampled_row(), tmp_path / "a.gif"
    write_gif(path, denoising, "step", delay=0.25)
    frames = denoising.frames()
    with Image.open(path) as image:
        assert image.n_frames == len(frames) and image.info["loop"] == 0
        for number, frame in enumerate(frames):
            image.seek(number)
            assert image.info["duration"] == {0: 800, len(frames) - 1: 3000}.get(number, 250)
            pixels = np.asarray(image.convert("RGB"))[: -image.height // 3].astype(int)  # without the colour scale
            for cell in frames[-1].cells:
                if cell.kind is Kind.WRITTEN:
                    fill = ImageColor.getrgb(colour_of(cell, "step", denoising.num_steps).fill)
                    assert (abs(pixels - fill).max(-1) <= 6).any() == (cell.step <= frame.step)


class Tags(HTMLParser):
    """The tags of a page, their attributes that could load something, and the text of each script."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.links, self.scripts = [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "action", "srcset")]

    def handle_data(self, data):
        if self.tags[-1:] == ["script"] and data.strip():
            self.scripts.append(data)


def replayed(frames: list[dict]) -> list[list[tuple]]:
    """The cells of every frame, from the differences that the page holds."""
    states: list[list[tuple]] = []
    for frame in frames:
        cells = list(states[-1]) if states else [None] * len(frame["cells"])
        for place, *cell in frame["cells"]:
            cells[place] = tuple(cell)
        states.append(cells)
    return states


def test_a_page_holds_every_frame_and_needs_nothing_else(tmp_path):
    denoising, path = sampled_row(), tmp_path / "a.html"
    write_page(path, denoising, "confidence", delay=0.25)
    page = Tags(path.read_text("utf-8"))
    assert page.links == [] and page.tags.count("script") == 2 and "b" not in page.tags
    assert {"html", "input", "button", "output"} <= {*page.tags}
    data = json.loads(page.scripts[0])
    assert (data["prompt"], data["caption"]) == ("How many <b>pens</b>\n& why?", "tiny </script>")
    assert (data["by"], data["delay"], data["num_steps"]) == ("confidence", 0.25, denoising.num_steps)
    frames = denoising.frames()
    assert [frame["step"] for frame in data["frames"]] == [frame.step for frame in frames]
    assert replayed(data["frames"]) == [[tuple(cell) for cell in frame.cells] for frame in frames]
    assert len(data["frames"][1]["cells"]) < LENGTH  # what has changed alone
    assert data["scales"]["step"]["ends"] == ["step 1", f"step {denoising.num_steps}"]


def test_a_page_holds_texts_that_change_when_a_neighbour_is_written():
    """The tokenizer puts a space between words, so a word begins with one as soon as there is one before it."""
    trajectory, changes = rollout(), 0
    for row in range(ROWS):
        denoising = blank(row).read(trajectory)
        states = replayed(page_data(denoising, "step", 0.1)["frames"])
        assert states == [[tuple(cell) for cell in frame.cells] for frame in denoising.frames()]
        for before, after in pairwise(states):
            changes += sum(a != b and a[0] == b[0] == Kind.WRITTEN for a, b in zip(before, after, strict=True))
    assert changes > 0


def test_line_ends_and_long_tokens_have_their_place_in_a_gif(tmp_path):
    """A token that spans three lines, one that is longer than two, and as many short ones as fill two."""
    words = {2: "a", 3: "\n  b\n\n", 4: "long" * 30}

    class Words:
        def decode(self, ids, **_):
            return "".join(words[token] for token in ids)

    family = DiffusionFamily("words", mask_token_id=0, num_tokens=5, end_token_ids=(1,), tail_token_id=1)
    heights = []
    for ids in ([2], [2, 3], [2, 3, 4], [2] * 32, [2] * 64):
        denoising = Denoising("prompt", family, Words(), len(ids), BLOCK, 1)
        denoising.token_ids, denoising.unmask_step = ids, [0] * len(ids)
        denoising.confidence, denoising.finished = [1.0] * len(ids), True
        write_gif(tmp_path / "a.gif", denoising, "confidence")
        with Image.open(tmp_path / "a.gif") as image:
            heights.append(image.height)
            image.seek(1)
            fill = ImageColor.getrgb(colour("confidence", 1.0).fill)
            pixels = np.asarray(image.convert("RGB"))[:-100].astype(int)  # without the colour scale
            columns = (abs(pixels - fill).max(-1) <= 6).any(0).nonzero()[0]
            assert columns.min() >= 36 and columns.max() < 960 - 36
    assert [height - heights[0] for height in heights] == [0, 3 * 54, 5 * 54, 54, 2 * 54]


# ---------------------------------------------------------------- colours


@pytest.mark.parametrize("by", ["step", "confidence"])
def test_tokens_can_be_read_on_their_colours(by):
    def luminance(name: str) -> float:
        values = [value / 255 for value in ImageColor.getrgb(name)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in values]
        return float(np.dot(linear, (0.2126, 0.7152, 0.0722)))

    for share in np.linspace(0, 1, 50):
        light, dark = sorted(map(luminance, colour(by, share)), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize(
    "show", [lambda d, p: LiveView(d, terminal(), "stepp"), lambda d, p: write_gif(p, d, "stepp")]
)
def test_an_unknown_colouring_is_refused(show, tmp_path):
    with pytest.raises(ValueError, match=r"color must be one of step, confidence; got 'stepp'. Did you mean 'step'"):
        show(blank(), tmp_path / "a.gif")
    with pytest.raises(ValueError, match="Did you mean 'confidence'"):
        write_page(tmp_path / "a.html", blank(), "confidense")
    assert not [*tmp_path.iterdir()]
