"""Read from a checkpoint's tokenizer what its `config.json` leaves out: mask token, end of turn, number of tokens."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

DOWNLOAD = ("revision", "cache_dir", "token", "local_files_only", "subfolder")  # arguments that say where files are


class TokenizerFacts:
    """Mixin of a config, before `DiffusionConfigMixin`; reads the tokenizer in every way of loading a config.

    What `config.json` or the caller says is taken as it is. Where there is no tokenizer nothing is filled in.
    """

    turn_end: ClassVar[str | None] = None  # token that ends an answer, in addition to those of the config

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any):
        """Read the config as transformers does, and the rest from the tokenizer next to it."""
        kwargs.setdefault("name_or_path", pretrained_model_name_or_path)  # as AutoConfig does
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any):
        """Make the config, and fill in what neither `config_dict` nor the arguments name."""
        name, places = kwargs.get("name_or_path"), {key: kwargs[key] for key in DOWNLOAD if kwargs.get(key)}
        given = {key for key, value in {**config_dict, **kwargs}.items() if value is not None}
        loaded = super().from_dict(config_dict, **kwargs)  # type: ignore[misc]  # the stock config comes next
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with return_unused_kwargs=True
        needed = config.mask_token_id is None or (cls.turn_end is not None and "end_token_ids" not in given)
        if needed and name and has_tokenizer(name, places):
            config.read_tokenizer(PreTrainedTokenizerFast.from_pretrained(name, **places), given)
        return loaded

    def read_tokenizer(self: Any, tokenizer: Any, given: set[str]) -> None:
        """Fill in what the config leaves out.

        Args:
            tokenizer: of the checkpoint.
            given: keys that somebody gave a value for.
        """
        if self.mask_token_id is None:
            self.mask_token_id = tokenizer.mask_token_id
        vocabulary: dict[str, int] = tokenizer.get_vocab()
        if self.turn_end in vocabulary and "end_token_ids" not in given:
            eos = self.eos_token_id if isinstance(self.eos_token_id, (list, tuple)) else [self.eos_token_id]
            ends = [*(self.end_token_ids or eos), vocabulary[self.turn_end]]
            self.end_token_ids = [*dict.fromkeys(token for token in ends if token is not None)]
        if self.mask_token_id is not None and "num_tokens" not in given:
            self.num_tokens = min(max(vocabulary.values()) + 1, self.vocab_size)


def has_tokenizer(name: str, places: dict[str, Any]) -> bool:
    """Return whether there is a tokenizer next to a checkpoint.

    Args:
        name: of the checkpoint, on the Hub or a folder.
        places: arguments of `from_pretrained` that say where its files are.
    """
    return cached_file(name, "tokenizer.json", _raise_exceptions_for_missing_entries=False, **places) is not None
