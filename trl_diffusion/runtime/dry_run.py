"""Plan a run without a GPU, without weights and, if need be, without the Hub, and report what it would be.

The trainer is the one that would train, built with all its checks. Only its network has no weights (it lies on
PyTorch's `meta` device), its launch is pretended, and files that the Hub does not give are replaced by stand-ins.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from rich.panel import Panel
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.training_args import OptimizerNames
from transformers.utils.quantization_config import QuantizationConfigMixin

from trl_diffusion.adapters.renaming import base_of, is_adapter
from trl_diffusion.models.meta_model import empty_model, native_config
from trl_diffusion.models.published import published_config
from trl_diffusion.runtime.arguments import check_load_arguments, check_model
from trl_diffusion.runtime.forecast import Evaluation, Machine, duration, memory_table
from trl_diffusion.runtime.launch import check_offloaded_optimizer, pretended
from trl_diffusion.runtime.planned_launch import Launch
from trl_diffusion.runtime.report import Figures, report_panel
from trl_diffusion.runtime.run import TrainingRun
from trl_diffusion.runtime.stand_ins import (
    CHARACTERS_PER_TOKEN,
    from_caches_only,
    hub_is_reachable,
    stand_in_rows,
    stand_in_tokenizer,
)
from trl_diffusion.runtime.text import plural

NOT_CHECKED = (
    "weights, which are not read; a forward pass; rewards; the start of the processes and of their backend; memory of "
    "kernels, of the allocator and of messages between processes; speed"
)


@dataclass
class DryRun:
    """The parts of a planned run. Inside of `active` they are loaded, each once, and what is missing is noted.

    Args:
        launch: how processes would train together.
        prompt_tokens: assumed length of prompts where no rows can be read.
        num_rows: assumed number of rows where none can be read; `None` for no assumption.
    """

    launch: Launch
    prompt_tokens: int
    num_rows: int | None = None
    notes: list[str] = field(default_factory=list, init=False)
    rows_read: bool = field(default=True, init=False)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Pretend the launch; where the Hub does not answer, read from the caches of Hugging Face's libraries."""
        with pretended(self.launch.processes, self.launch.mixed_precision):
            self._online = hub_is_reachable()
            with nullcontext() if self._online else from_caches_only():
                yield

    def tokenizer(self, load: Callable[[], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
        """Return the tokenizer, or a stand-in."""
        try:
            return load()
        except OSError:
            if self._online:
                raise
        self.notes.append(f"a token is {CHARACTERS_PER_TOKEN} characters, because the tokenizer is not at hand")
        return stand_in_tokenizer()

    def rows(
        self,
        load: Callable[[], tuple[Dataset, Dataset]],
        columns: Mapping[str, Any],
        tokenizer: PreTrainedTokenizerBase,
        needed: int,
    ) -> tuple[Dataset, Dataset]:
        """Return training and held-out rows, or stand-ins.

        Args:
            load: reads them.
            columns: those of the rows, in addition to `prompt` and `completion`.
            tokenizer: for the length of the stand-ins' prompts.
            needed: rows that the run needs at least.
        """
        try:
            return load()
        except ConnectionError:
            if self._online:
                raise
        self.rows_read = False
        self.notes.append(f"prompts have {self.prompt_tokens} tokens, because no rows were read")
        if self.num_rows is not None:
            self.notes.append(f"there are {plural(self.num_rows, 'row')}")
        count = needed if self.num_rows is None else min(needed, self.num_rows)
        rows = stand_in_rows(tokenizer, self.prompt_tokens, columns, count)
        return rows, rows.select(range(1))

    def policy(
        self, name: str, loading: Mapping[str, Any], quantization_config: QuantizationConfigMixin | None
    ) -> Any:
        """Return the model that would be trained, without weights; a `PeftModel` if `name` is an adapter.

        Args:
            name: model or adapter, on the Hub or in a folder.
            loading: arguments of `from_pretrained`.
            quantization_config: bitsandbytes' config, or `None`.
        """
        check_load_arguments(dict(loading))
        base = str(base_of(name)) if is_adapter(name) else name
        config = self._config(base, loading.get("revision"))
        # what a checkpoint's config.json may leave to the user
        for key in ("mask_token_id", "block_size", "block_origin"):
            if key in loading:
                setattr(config, key, loading[key])
        model: Any = empty_model(config, loading.get("dtype"), loading.get("attn_implementation"), quantization_config)
        if base == name:
            return model
        adapter = PeftConfig.from_pretrained(name)
        adapter.inference_mode = False
        with torch.device("meta"):
            return get_peft_model(model, adapter)

    def _config(self, name: str, revision: str | None) -> PreTrainedConfig:
        try:
            check_model(name)
            return native_config(name, revision)
        except OSError:
            if self._online:
                raise
        config = published_config(name)
        self.notes.append(f"the sizes of {name} are those that come with trl_diffusion")
        return config

    def build(self, trainer_class: Callable[..., Any], args: Any, **arguments: Any) -> Any:
        """Build the trainer, with weights of new adapters on the `meta` device too, and check it for the backend.

        Args:
            trainer_class: the method's trainer.
            args: its config.
            **arguments: its other arguments.

        Raises:
            ValueError: whatever the trainer refuses, and settings that the backend refuses.
        """
        args.model_init_kwargs = None  # used already
        with torch.device("meta"):
            trainer = trainer_class(args=args, **arguments)
        launch = self.launch
        if launch.deepspeed is not None:
            check_offloaded_optimizer(OptimizerNames(args.optim).value, launch.deepspeed)
            trainer.is_deepspeed_enabled = True
            trainer.check_update_policy()
            trainer.is_deepspeed_enabled = False
            if launch.zero_stage == 3:
                _cast_adapter(trainer.model)
        return trainer

    def report(
        self,
        run: TrainingRun,
        figures_of: Callable[[Any], Figures],
        machine: Machine,
        evaluation: Evaluation | None,
        source: str,
    ) -> Panel:
        """Return the panel of the planned run.

        Args:
            run: the trainer's values.
            figures_of: makes its figures.
            machine: what is assumed of the GPUs.
            evaluation: of held-out accuracy; `None` for none.
            source: name of the data.
        """
        run = replace(run, launch=self.launch, rows=run.rows if self.rows_read else self.num_rows)
        figures = figures_of(run)
        held_out = "" if evaluation is None else f"; {plural(evaluation.problems, 'problem')} held out"
        data = figures.facts["data"] if self.rows_read else "rows not read, offline"
        facts = {
            "launch": f"{self.launch}{', pretended by one' if self.launch.processes > 1 else ''}",
            **figures.facts,
            "data": f"{source}: {data}{held_out}",
            "time": duration(run, figures, machine, evaluation),
            "assumed": "; ".join(self.notes) or "nothing about model and data, which were read",
            "not checked": NOT_CHECKED,
        }
        del facts["memory"], facts["activations"]  # in the table, against the memory of the GPU
        return report_panel(run, facts, [figures.costs, memory_table(run, figures, machine)], " · dry run")


def is_first_process() -> bool:
    """Return whether this is the process that reports, of all that a launcher has started."""
    return os.environ.get("RANK", "0") == "0"


def _cast_adapter(model: Any) -> None:
    """Give an adapter the dtype of its base, as TRL does under ZeRO-3, which gathers weights of one dtype only."""
    if isinstance(model, PeftModel):
        dtype: Any = model.get_base_model().dtype
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data = weight.data.to(dtype)
