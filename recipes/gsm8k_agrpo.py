"""AGRPO on GSM8K, from prompts to a trained model or adapter.

The embedded model on synthetic word problems (a few minutes on two CPU cores):

    accelerate launch recipes/gsm8k_agrpo.py

LLaDA-8B on GSM8K:

    accelerate launch --config_file recipes/accelerate_configs/zero2.yaml recipes/gsm8k_agrpo.py \
        --config recipes/configs/llada_8b/gsm8k_agrpo.yaml

Everything in a config can be overridden on the command line, for example `--seed 1 --max_steps 20`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from common import EvaluationArguments, ShortProgress, parse, report
from datasets import Dataset
from transformers import AutoTokenizer, ProgressCallback
from trl import get_peft_config

from trl_diffusion.evaluation import AccuracyCallback, evaluate_accuracy
from trl_diffusion.tasks.gsm8k import correctness_reward, format_reward, load_gsm8k
from trl_diffusion.tasks.word_problems import load_word_problems
from trl_diffusion.trainers import AGRPOConfig, AGRPOTrainer


@dataclass
class GSM8KArguments(EvaluationArguments):
    """What to train on."""

    dataset_path: str = field(
        default="openai/gsm8k",
        metadata={
            "help": "A Hub data set with GSM8K's columns, a local JSON-lines file, or `word_problems` for the "
            "embedded model's synthetic problems. The last `eval_size` rows of a local file are held out."
        },
    )
    dataset_size: int = field(default=4000, metadata={"help": "Synthetic word problems to draw."})


def load(args: GSM8KArguments, seed: int) -> tuple[Dataset, Dataset]:
    """Training and held-out rows."""
    if args.dataset_path == "word_problems":
        # The held-out problems do not change with the seed, so that runs can be compared.
        return load_word_problems("train", args.dataset_size, seed), load_word_problems("test", args.eval_size, 0)
    if args.dataset_path.endswith((".jsonl", ".json")):
        rows = load_gsm8k(args.dataset_path)
        if len(rows) <= args.eval_size:
            raise ValueError(
                f"{args.dataset_path} has {len(rows)} rows, of which --eval_size {args.eval_size} are held out, so "
                "nothing is left to train on. Lower --eval_size."
            )
        cut = len(rows) - args.eval_size
        return rows.select(range(cut)), rows.select(range(cut, len(rows)))
    return load_gsm8k(args.dataset_path, "train"), load_gsm8k(args.dataset_path, "test", limit=args.eval_size)


def is_correct(text: str, row: dict) -> bool:
    return correctness_reward([text], answer=[row["answer"]]) == [1.0]


def main() -> None:
    start = time.perf_counter()
    args, training_args, model_args, quantization_config = parse(
        GSM8KArguments, AGRPOConfig, "embedded/gsm8k_agrpo.yaml"
    )
    train, held_out = load(args, training_args.seed)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path, padding_side="left")
    trainer = AGRPOTrainer(
        model=model_args.model_name_or_path,
        reward_funcs=[correctness_reward, format_reward],
        args=training_args,
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
        quantization_config=quantization_config,
    )
    measure = partial(evaluate_accuracy, tokenizer=tokenizer, correct=is_correct, **args.decoding(training_args))
    accuracy = AccuracyCallback(trainer, held_out, measure, every=args.eval_every)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(ShortProgress)
    trainer.add_callback(accuracy)

    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.create_model_card(dataset_name=args.dataset_path)
    if trainer.accelerator.is_main_process:
        report(trainer, accuracy, time.perf_counter() - start)
        print(f"{'Adapter' if model_args.use_peft else 'Model'} and model card: {Path(training_args.output_dir)}")
    if training_args.push_to_hub:
        trainer.push_to_hub(dataset_name=args.dataset_path)
    trainer.end()


if __name__ == "__main__":
    main()
