"""The model class for the lm-evaluation-harness; its command line is tested with `recipes/evaluate.py`."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("lm_eval")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from trl_diffusion.evaluation.lm_eval.__main__ import main
from trl_diffusion.evaluation.lm_eval.likelihood_bound import log_likelihood_bound
from trl_diffusion.evaluation.lm_eval.model import DiffusionHarnessLM
from trl_diffusion.models.embedded import EMBEDDED_MODEL
from trl_diffusion.sampling import SamplingConfig, row_generators
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.tokenization import encode_prompt

QUESTION = [{"role": "user", "content": "Tom has 7 pens and gets 5 more. How many pens now?"}]


@pytest.fixture(scope="module")
def lm():
    return DiffusionHarnessLM(
        EMBEDDED_MODEL, canvas_length=32, denoising_steps=16, block_length=8, mc_num=16, batch_size=8, device="cpu"
    )


def request(kind: str, *arguments, row: int = 0, repeats: int = 1, task: str = "t") -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=(task, row, repeats))


def test_the_chat_template_gives_the_ids_of_an_evaluation(lm):
    assert lm.tok_encode(lm.apply_chat_template(QUESTION)) == encode_prompt(QUESTION, lm.tokenizer)
    begun = lm.apply_chat_template([*QUESTION, {"role": "assistant", "content": "7 +"}], add_generation_prompt=False)
    assert begun.endswith("7 +")


def test_texts_end_at_the_first_stop_string(lm):
    prompt = lm.apply_chat_template(QUESTION)

    def generate(until):
        return lm.generate_until([request("generate_until", prompt, {"until": until})], disable_tqdm=True)[0]

    whole = generate([])
    assert whole.count("\n") == 1 and "#" in whole
    assert generate(["\n", "#"]) == whole.split("\n")[0]
    assert generate(["#", "\n"]) == whole.split("\n")[0]
    assert generate(["never"]) == whole


def test_each_repeat_is_drawn_anew_and_in_any_company(lm):
    prompt = lm.apply_chat_template(QUESTION)
    drawn = {"until": [], "do_sample": True, "temperature": 1.0}
    repeats = [request("generate_until", prompt, drawn, row=3, repeats=4)] * 4
    texts = lm.generate_until(repeats, disable_tqdm=True)
    assert len(set(texts)) > 1 and texts == lm.generate_until(repeats, disable_tqdm=True)
    # another task beside them is decoded in batches of its own
    others = [request("generate_until", prompt, {"until": []}, task="other")] * 2
    assert lm.generate_until([others[0], *repeats, others[1]], disable_tqdm=True)[1:-1] == texts


def test_decoding_follows_the_task_where_the_model_says_nothing(lm):
    free = DiffusionHarnessLM(EMBEDDED_MODEL, block_length=8, batch_size="4", device="cpu", cache="dual")
    drawn = {"max_gen_toks": 30, "do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9}
    rules = {"unmasking": "max_prob", "record_support": False}  # completions are all that is kept
    assert free._decoding(dict(drawn)) == SamplingConfig(32, 16, 8, 0.6, 20, 0.9, **rules, cache="dual")
    assert free._decoding(drawn | {"top_k": 0}) == SamplingConfig(32, 16, 8, 0.6, 0, 0.9, **rules, cache="dual")
    greedy = {**drawn, "do_sample": False, "temperature": 0.0}
    assert lm._decoding(dict(greedy)) == SamplingConfig(32, 16, 8, 0.0, **rules)
    with pytest.raises(ValueError, match=r"does not have: \{'num_beams': 4\}"):
        free._decoding({**greedy, "num_beams": 4})


def test_an_unknown_decoding_option_is_named_with_those_that_exist():
    with pytest.raises(TypeError, match=r"no setting unmaskin, top_k\. .*are block_length, unmasking, confidence"):
        DiffusionHarnessLM(EMBEDDED_MODEL, unmaskin="random", top_k=3)


def test_what_cannot_be_answered_is_refused(lm):
    with pytest.raises(NotImplementedError, match="loglikelihood_rolling"):
        lm.loglikelihood_rolling([request("loglikelihood_rolling", "text")])
    with pytest.raises(ValueError, match="batch_size must be a whole number, got 'auto'"):
        DiffusionHarnessLM(EMBEDDED_MODEL, batch_size="auto")
    with pytest.raises(ValueError, match=r"prompt of t has .* 256 positions"):
        lm.generate_until([request("generate_until", "a " * 300, {"until": []})], disable_tqdm=True)
    with pytest.raises(ValueError, match="at least one token of context"):
        lm.loglikelihood([request("loglikelihood", "a", "")], disable_tqdm=True)


def test_loglikelihood_is_the_bound_and_does_not_depend_on_company(lm):
    prompt = lm.apply_chat_template(QUESTION)
    pairs = [(prompt, "7 + 5 = 12"), (prompt, "7 + 5 = 93"), (prompt, "!"), ("Tom", " has 7 pens")]
    requests = [request("loglikelihood", *pair) for pair in pairs]
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    assert answers[0][0] > answers[1][0] + 3 and not answers[1][1]
    assert lm.loglikelihood(requests[3:], disable_tqdm=True)[0][0] == pytest.approx(answers[3][0], abs=1e-4)
    # one token has one view: the estimate is exact, whatever the stream
    context, continuation = lm._encode_pair(*pairs[2])
    assert len(continuation) == 1
    assert answers[2][0] == pytest.approx(
        log_likelihood_bound(lm.model, [context], [continuation], row_generators(9, rows=[0]))[0]
    )


def test_a_token_over_the_boundary_loses_no_text(lm):
    """The embedded tokenizer has a token for ` = ` with both its spaces."""
    for context, continuation in (("7 + 5 =", " 12"), ("7 + 5", " = 12"), ("7 + 5 = ", "12"), ("Tom", " has")):
        left, right = lm._encode_pair(context, continuation)
        assert lm.tokenizer.decode(left) == context.rstrip(" ")
        assert lm.tokenizer.decode(left) + lm.tokenizer.decode(right) == context + continuation and right
    context = lm.apply_chat_template(QUESTION)
    assert lm.tokenizer.decode(lm._encode_pair(context, "7")[0]) == context


@pytest.mark.slow
def test_multiple_choice_finds_the_solution_of_the_question(lm, tmp_path, monkeypatch):
    """Four solutions, one of which has the question's numbers: the network can tell even where it cannot add."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    problems = load_word_problems("test", 16)
    solutions = [row["completion"][0]["content"] for row in problems]
    rows = [
        {
            "question": lm.apply_chat_template(row["prompt"]),
            "choices": [solutions[(index + offset - index % 4) % 16] for offset in range(4)],
            "answer": index % 4,
        }
        for index, row in enumerate(problems)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "choose",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    manager = TaskManager(include_defaults=False)
    results = simple_evaluate(model=lm, tasks=[task], task_manager=manager, bootstrap_iters=0)
    assert results["results"]["choose"]["acc,none"] >= 0.9


def test_without_the_harness_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit, match=r"pip install 'trl-diffusion\[lm-eval\]'"):
        main()
