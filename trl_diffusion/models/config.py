"""The part of a config that all families share: special tokens, number of tokens, and rotary embeddings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

# Any of these in a config says that the MLPs are mixtures of experts.
_EXPERT_KEYS = (
    "num_experts",
    "num_local_experts",
    "n_routed_experts",
    "num_experts_per_tok",
    "expert_intermediate_size",
    "moe_intermediate_size",
)


class Vocabulary(NamedTuple):
    """The published vocabulary of a family, recognised by its size, with the ids that its `config.json` leaves out.

    Args:
        size: rows of the embedding.
        num_tokens: how many of them have a token; the others pad the matrix.
        end_token_ids: ids that end a text.
        mask_token_id: `None` where the published `config.json` names it.
    """

    size: int
    num_tokens: int
    end_token_ids: tuple[int, ...]
    mask_token_id: int | None = None


@dataclass(kw_only=True, repr=False)  # a dataclass, because transformers collects the fields of configs as such
class DiffusionConfigMixin:
    """Fields and checks of a diffusion language model's config; stands before the stock config class.

    Args:
        mask_token_id: id of the mask token.
        end_token_ids: ids that end a text; the first one fills the canvas behind it. If not given, those of the
            family's published vocabulary where the size is that one's, else `eos_token_id`.
        num_tokens: number of ids that have a token; rows of the embedding from there on are never sampled.
        is_causal: `False` turns off the causal mask of the stock class.
        auto_map: remote code of the checkpoint, which is not used.
    """

    published: ClassVar[Vocabulary]
    has_experts: ClassVar[bool] = False

    @property
    def shared_width(self) -> int:
        """Width of the experts that every token goes through."""
        return 0

    mask_token_id: int | None = None
    end_token_ids: list[int] | None = None
    num_tokens: int | None = None
    is_causal: bool = False
    auto_map: dict[str, Any] | None = None

    def read_hub_keys(self, keys: dict[str, Any]) -> None:
        """Translate the hub's own keys into fields and refuse variants that the class does not compute.

        A family overrides this; the base has nothing to translate.

        Args:
            keys: those of `config.json` that are no fields of the config; changed in place. What is left becomes
                attributes.

        Raises:
            ValueError: for a variant that the class does not compute.
        """

    # `self` is also the stock config, whose fields (`vocab_size` …) are not declared here: a second declaration would
    # replace theirs.
    def __post_init__(self: Any, **keys: Any):
        if not self.has_experts:
            require_dense(self.model_type, keys)  # first: the message that helps most with a mixture of experts
        self.read_hub_keys(keys)
        is_published = self.vocab_size == self.published.size
        if is_published:
            if self.mask_token_id is None:
                self.mask_token_id = self.published.mask_token_id
            if self.end_token_ids is None:
                self.end_token_ids = list(self.published.end_token_ids)
            if self.eos_token_id is None:
                self.eos_token_id = self.published.end_token_ids[0]
        if self.num_tokens is None:
            self.num_tokens = self.published.num_tokens if is_published else self.vocab_size
        self.auto_map = self.auto_map or {}  # TRL's loader reads it from every config that it does not know
        super().__post_init__(**keys)  # type: ignore[misc]  # the stock config comes next
        require_plain_rope(self)

    def to_dict(self: Any) -> dict[str, Any]:
        """Return the configuration with the hub's `rope_theta`, as `config.json` stores it."""
        output = super().to_dict()  # type: ignore[misc]  # the stock config comes next
        output["rope_theta"] = output.pop("rope_parameters")["rope_theta"]
        return output


def require_plain_rope(config: Any) -> None:
    """Check that a config has unscaled rotary embeddings, the only kind written back under the hub's keys.

    Args:
        config: a transformers config, after its `__post_init__`.

    Raises:
        ValueError: if its rotary embeddings are scaled (linear, yarn …).
    """
    if (rope_type := config.rope_parameters["rope_type"]) != "default":
        raise ValueError(
            f"This {config.model_type} variant has rope_scaling of type {rope_type!r}; trl_diffusion computes "
            "unscaled rotary embeddings only. Remove `rope_scaling` (or `rope_parameters`) from its config."
        )


def require_dense(model_type: str, keys: dict[str, Any]) -> None:
    """Check that a config is of a dense network; LLaDA-MoE's first checkpoints call themselves `llada`.

    Args:
        model_type: of the config.
        keys: those of the config that its class does not know.

    Raises:
        ValueError: if it has experts.
    """
    for key in _EXPERT_KEYS:
        if keys.get(key):
            raise ValueError(
                f"This {model_type} variant has {key}={keys[key]!r}: its MLPs are mixtures of experts, which "
                f"trl_diffusion does not compute for {model_type}. Use a dense checkpoint."
            )
