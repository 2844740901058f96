"""What a dry run puts in place of files on the Hub that it cannot get, and how it finds out that it cannot.

A stand-in has the shapes that an estimate depends on. The report of the dry run names every one.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

import datasets
from datasets import Dataset
from huggingface_hub import constants
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

CHARACTERS_PER_TOKEN = 3  # of the stand-in tokenizer; English text has about four in the vocabularies of dLLMs
_TIMEOUT = 5.0  # seconds

# About the length of a published chat template: ten tokens.
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}<|assistant|>"
)


def hub_is_reachable() -> bool:
    """Return whether the Hub answers, within five seconds.

    The libraries themselves try for half a minute per file before they look into their caches.
    """
    if constants.is_offline_mode():
        return False
    try:
        urlopen(Request(constants.ENDPOINT, method="HEAD"), timeout=_TIMEOUT).close()
    except HTTPError:
        return True  # it answers
    except URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # certificates are for the libraries to judge
    except TimeoutError:
        return False
    return True


@contextmanager
def from_caches_only() -> Iterator[None]:
    """Let Hugging Face's libraries read from their caches only, as HF_HUB_OFFLINE=1 does.

    They read the environment variable once, when they are imported.
    """
    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def stand_in_tokenizer() -> PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are three characters each, to estimate the lengths of prompts."""
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "<unknown>": 1}, unk_token="<unknown>"))
    pieces = Regex(rf"[\s\S]{{1,{CHARACTERS_PER_TOKEN}}}")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pieces, behavior="isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<pad>",
        padding_side="left",
        chat_template=_CHAT_TEMPLATE,
    )


def stand_in_rows(
    tokenizer: PreTrainedTokenizerBase, prompt_tokens: int, columns: Mapping[str, Any], count: int
) -> Dataset:
    """Return rows whose prompts have a given length, for data that could not be read.

    Args:
        tokenizer: the model's, or a stand-in.
        prompt_tokens: tokens of every prompt, give or take a word.
        columns: the other columns, as features of `datasets`; they are empty but for `completion`.
        count: how many rows.
    """
    prompt = ""
    while len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) < prompt_tokens:
        prompt += "apples "
    rows = {"prompt": [prompt] * count, "completion": ["one"] * count}
    return Dataset.from_dict(rows | {name: [None] * count for name in columns if name not in rows})
