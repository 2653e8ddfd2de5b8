"""Trains SFT and the reward model with our loops and with TRL's, on the same pairs: `make parity-training PAIRS=FILE`.

Both sides begin from the same model, with the same adapters and the same head, see the same tokens in the same batches
for one epoch, and are measured on the same held-out pairs with the same formulas. Every value of the recipe comes from
params.yaml. Each run writes a JSON file when it is done, and a run that has its file is not done again, so the whole
may be stopped and started at will. What the sides still differ in stands in docs/parity.md.

    python scripts/parity_training.py PAIRS.jsonl.gz [--model FOLDER] [--pairs 1200] [--held-out N] [--seeds 3]
"""

import argparse
import hashlib
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import tasks  # noqa: F401  first: it switches network and telemetry off before huggingface_hub reads the switches

# isort: split
import numpy as np
import torch
import transformers
from torch import Tensor

from rlhf_core.config import SFT, Reward, load_params
from rlhf_core.data import BadField, parse_ranking, read_rows
from rlhf_core.models import Roles, load_tokenizer
from rlhf_core.optimisation import epochs_of
from rlhf_core.records import Demonstration, Ranking
from rlhf_core.reward import (
    EncodedRanking,
    Judged,
    accuracy,
    encode_rankings,
    judge_rankings,
    train_reward,
    validation_loss,
)
from rlhf_core.sft import Example, encode_demonstrations, train_sft
from rlhf_core.tracking import NullTracker

TASKS, SIDES = ("reward", "sft"), ("ours", "trl")
LONGEST = 1024  # tokens of a response; no pair of hh-harmless is cut
PER_PASS = 8  # rows of TRL's evaluation batches
ROLE = "policy"  # also of the reward model: the name is in the adapters' keys only


class Start(NamedTuple):
    """Where both sides begin: the adapter's shape, and the weights of adapter and head by the names TRL gives them."""

    shape: Any
    weights: dict[str, Tensor]


# ---- data


def usable_pairs(file: str) -> tuple[list[Ranking], int]:
    """The pairs of a file in the order of their prompts' hashes, and how many rows cannot be read."""
    pairs, bad = [], 0
    for _, row in read_rows(file):
        try:
            pairs.append(parse_ranking(row))
        except BadField:
            bad += 1
    return sorted(pairs, key=_place), bad


def _place(pair: Ranking) -> tuple[str, tuple[str, ...]]:
    digest = hashlib.sha256(json.dumps(pair.prompt, ensure_ascii=False).encode()).hexdigest()
    return digest, pair.responses


def split_pairs(pairs: Sequence[Ranking], count: int, held_out: int | None) -> tuple[list[Ranking], list[Ranking]]:
    """The first `count` pairs to train on, the last ones (all others, or `held_out`) to judge by; no prompt in both."""
    train = list(pairs[:count])
    asked = {pair.prompt for pair in train}
    rest = [pair for pair in pairs[count:] if pair.prompt not in asked]
    wanted = len(rest) if held_out is None else held_out
    if len(train) < count or len(rest) < wanted or not wanted:
        raise SystemExit(
            f"Found {len(pairs)} usable pairs, expected {count} to train on and {wanted or 'some'} to hold out. "
            "Ask for fewer with --pairs and --held-out."
        )
    return train, rest[len(rest) - wanted :]


# ---- the start that both sides share


def start_of(roles: Roles) -> Start:
    """The fresh adapter and head of a role."""
    assert roles.peft is not None
    weights = {
        name.replace(f".{ROLE}.", ".default."): value.detach().clone()
        for name, value in roles.peft.named_parameters()
        if f".{ROLE}." in name
    }
    if ROLE in roles.heads:
        head: Any = roles.heads[ROLE]
        weights["base_model.model.score.modules_to_save.default.weight"] = head.weight.detach().clone()
    return Start(roles.peft.peft_config[ROLE], weights)


def begin_from(model: Any, start: Start) -> None:
    """Give TRL's model the same adapter and head; every weight that it trains has to be among them."""
    trained = {name for name, value in model.named_parameters() if value.requires_grad}
    assert trained == set(start.weights), trained ^ set(start.weights)
    left = model.load_state_dict(start.weights, strict=False)
    assert not left.unexpected_keys, left.unexpected_keys


def fresh_roles(model: str, section: Any, *, head: bool) -> Roles:
    """The model with one fresh role, as the stages make it."""
    roles = Roles(model, section)
    torch.manual_seed(section.seed)
    roles.add(ROLE, head=head)
    return roles


def in_order(rows: Sequence[Any], section: Any) -> list[Any]:
    """The rows as our loop takes them, batch after batch."""
    generator = torch.Generator().manual_seed(section.seed)
    batches = epochs_of(len(rows), epochs=1, batch_size=section.batch_size, generator=generator)
    return [rows[row] for batch in batches for row in batch.rows]


# ---- the runs


def ours_reward(model: str, train: list[EncodedRanking], held: list[EncodedRanking], section: Reward) -> dict[str, Any]:
    """Our loop. Of one epoch there is nothing to choose, so one ranking is enough for its own validation."""
    pad_id = int(load_tokenizer(model).pad_token_id)
    roles = fresh_roles(model, section, head=True)
    train_reward(roles, ROLE, train, train[:1], section, pad_id=pad_id, tracker=NullTracker())
    return judged_numbers(judge_rankings(roles, ROLE, held, pad_id).margins)


def trl_reward(model: str, train: list[EncodedRanking], held: list[EncodedRanking], section: Reward) -> dict[str, Any]:
    """TRL's RewardTrainer, told as near to our recipe as its settings go."""
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    start = start_of(fresh_roles(model, section, head=True))
    tokenizer = load_tokenizer(model)

    def rows(rankings: Sequence[EncodedRanking]) -> Any:
        return Dataset.from_list(
            [{"chosen_ids": ranking.ids[0], "rejected_ids": ranking.ids[1]} for ranking in rankings]
        )

    with tempfile.TemporaryDirectory() as folder, _quietly():
        trainer = RewardTrainer(
            AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.float32),
            RewardConfig(
                folder, **settings(section, len(train)), center_rewards_coefficient=section.center_coef or None
            ),
            train_dataset=rows(in_order(train, section)),
            eval_dataset=rows(held),
            processing_class=tokenizer,
            peft_config=adapter(start, "SEQ_CLS"),
        )
        begin_from(trainer.model, start)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        scores: list[Tensor] = []
        trainer.model.register_forward_hook(lambda _module, _inputs, out: scores.append(out.logits.squeeze(-1)))
        told = trainer.evaluate()
    halves = [part.chunk(2) for part in scores]
    margins = torch.cat([chosen - rejected for chosen, rejected in halves]).numpy()
    return judged_numbers(margins) | {"told_accuracy": told["eval_accuracy"], "told_loss": told["eval_loss"]}


def ours_sft(model: str, train: list[Example], held: list[Example], section: SFT) -> dict[str, Any]:
    """Our loop; it would keep the base if the epoch did not help, and the result says which it kept."""
    pad_id = int(load_tokenizer(model).pad_token_id)
    roles = fresh_roles(model, section, head=False)
    found = train_sft(roles, train, held, section, pad_id=pad_id, tracker=NullTracker())
    loss, base_loss = (math.log(found[f"{which}_perplexity"]) for which in ("validation", "base"))
    return {"loss": loss, "base_loss": base_loss, "kept_epoch": found["best_epoch"]}


def trl_sft(model: str, train: list[Example], held: list[Example], section: SFT) -> dict[str, Any]:
    """TRL's SFTTrainer, on ids whose prompts are left out of the loss."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    start = start_of(fresh_roles(model, section, head=False))

    def rows(examples: Sequence[Example]) -> Any:
        hidden = [[-100] * len(example.prompt) + example.response for example in examples]
        ids = [example.prompt + example.response for example in examples]
        return Dataset.from_dict({"input_ids": ids, "labels": hidden})

    with tempfile.TemporaryDirectory() as folder, _quietly():
        trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
            SFTConfig(folder, **settings(section, len(train))),
            train_dataset=rows(in_order(train, section)),
            eval_dataset=rows(held),
            processing_class=load_tokenizer(model),
            peft_config=adapter(start, "CAUSAL_LM"),
        )
        begin_from(trainer.model, start)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        parts: list[tuple[float, int]] = []
        trainer.model.register_forward_hook(
            lambda _module, _inputs, out: parts.append((out.loss.item(), int(out.num_valid_tokens)))
        )
        told = trainer.evaluate()
    tokens = sum(count for _, count in parts)
    assert tokens == sum(len(example.response) for example in held)
    return {"loss": sum(loss * count for loss, count in parts) / tokens, "told_loss": told["eval_loss"]}


def judged_numbers(margins: np.ndarray) -> dict[str, Any]:
    """Accuracy and loss of held-out pairs, and each pair's margin."""
    judged = Judged(margins, np.zeros(len(margins)), len(margins))
    return {
        "accuracy": accuracy(judged),
        "loss": validation_loss(judged),
        "margins": [round(float(margin), 6) for margin in margins],
    }


def settings(section: Any, count: int) -> dict[str, Any]:
    """Our recipe in the words of transformers' arguments, the same batches and no precision but float32."""
    steps = math.ceil(count / section.batch_size)
    return {
        "num_train_epochs": 1,
        "per_device_train_batch_size": section.micro_batch_size,
        "per_device_eval_batch_size": PER_PASS,
        "gradient_accumulation_steps": section.batch_size // section.micro_batch_size,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.schedule,
        "warmup_steps": round(section.warmup_fraction * steps),
        "weight_decay": section.weight_decay,
        "adam_epsilon": 1e-5,
        "max_grad_norm": section.max_grad_norm,
        "train_sampling_strategy": "sequential",
        "max_length": None,
        "seed": section.seed,
        "bf16": False,
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }


def adapter(start: Start, kind: str) -> Any:
    """The shape of our adapter for TRL's model; a head, where there is one, is trained whole on both sides."""
    from peft import LoraConfig

    return LoraConfig(
        task_type=kind,
        r=start.shape.r,
        lora_alpha=start.shape.lora_alpha,
        target_modules=sorted(start.shape.target_modules),
        layers_to_transform=start.shape.layers_to_transform,
        bias="none",
    )


def _quietly() -> Any:
    # TRL 1.10 and transformers 5.23 warn of each other's names.
    transformers.logging.set_verbosity_error()
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


RUNS: dict[tuple[str, str], Callable[..., dict[str, Any]]] = {
    ("reward", "ours"): ours_reward,
    ("reward", "trl"): trl_reward,
    ("sft", "ours"): ours_sft,
    ("sft", "trl"): trl_sft,
}


# ---- results that outlive an interruption


def kept(path: Path, told: dict[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result in a file, or of the run, which then writes it; a file of other settings is refused."""
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] != told:
            other = sorted(
                key for key in told.keys() | found["settings"] if told.get(key) != found["settings"].get(key)
            )
            raise SystemExit(f"{path} was made with other {', '.join(other)}. Give another folder with --out.")
        return found["result"]
    began = time.perf_counter()
    result = {**run(), "seconds": round(time.perf_counter() - began, 1)}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"settings": told, "result": result}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return result


def summary(results: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """A markdown table of all pairs of runs that are done, and each task's mean difference over its seeds."""
    lines = ["| task | seed | held-out | ours | TRL | ours − TRL |", "|---|---:|---|---:|---:|---:|"]
    for task, names in (("reward", ("accuracy", "loss")), ("sft", ("loss",))):
        seeds = sorted({seed for kind, _, seed in results if kind == task})
        both = [seed for seed in seeds if all((task, side, seed) in results for side in SIDES)]
        for name in names:
            pairs = [tuple(results[task, side, seed][name] for side in SIDES) for seed in both]
            for seed, (ours, theirs) in zip(both, pairs, strict=True):
                lines.append(f"| {task} | {seed} | {name} | {ours:.4f} | {theirs:.4f} | {ours - theirs:+.4f} |")
            if len(pairs) > 1:
                gaps = [ours - theirs for ours, theirs in pairs]
                ours, theirs = (mean(column) for column in zip(*pairs, strict=True))
                spread = f"{mean(gaps):+.4f} (deviation {stdev(gaps):.4f})"
                lines.append(f"| {task} | all {len(pairs)} | {name} | {ours:.4f} | {theirs:.4f} | {spread} |")
    return "\n".join(lines)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; the defaults are the whole protocol."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", help="pairs: JSON lines, gzip too; HH dialogues, or prompt, chosen and rejected")
    parser.add_argument("--model", default="artifacts/base", help="a Hugging Face folder, ours by default")
    parser.add_argument("--pairs", type=int, default=1200, help="pairs to train on")
    parser.add_argument("--held-out", type=int, help="pairs to judge by; all others by default")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds, from 0")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--learning-rate", type=float, help="in place of params.yaml's, for both tasks")
    parser.add_argument(
        "--schedule", choices=("constant", "linear", "cosine"), help="likewise; constant has no warm-up"
    )
    parser.add_argument("--center-coef", type=float, help="likewise, of the reward model")
    parser.add_argument("--params", default="params.yaml")
    parser.add_argument("--out", type=Path, default=Path(".rlhf/parity"), help="folder of the results")
    return parser.parse_args(arguments)


def sections(options: argparse.Namespace) -> dict[str, Any]:
    """Sections sft and reward of params.yaml, with one epoch and what the command line says."""
    params = load_params(options.params)
    changes: dict[str, Any] = {"epochs": 1}
    if options.learning_rate is not None:
        changes["learning_rate"] = options.learning_rate
    if options.schedule is not None:
        changes |= {"schedule": options.schedule}
        changes |= {"warmup_fraction": 0.0} if options.schedule == "constant" else {}
    reward = changes | ({} if options.center_coef is None else {"center_coef": options.center_coef})
    return {"sft": params.sft.model_copy(update=changes), "reward": params.reward.model_copy(update=reward)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Do the runs that are not done, and print the table of those that are."""
    options = parse(arguments)
    try:
        import trl
    except ModuleNotFoundError as error:
        raise SystemExit("TRL is not installed. Run `make parity-training`, which installs it first.") from error
    pairs, bad = usable_pairs(options.file)
    train, held = split_pairs(pairs, options.pairs, options.held_out)
    print(f"{len(train)} pairs to train on, {len(held)} held out; {bad} rows cannot be read", flush=True)
    tokenizer = load_tokenizer(options.model)
    encoded: dict[str, tuple[Any, Any]] = {}
    for task in options.tasks:
        if task == "reward":
            parts = [encode_rankings(part, tokenizer, system="", max_response_tokens=LONGEST) for part in (train, held)]
        else:
            chosen = [[Demonstration(pair.prompt, pair.responses[0]) for pair in part] for part in (train, held)]
            parts = [encode_demonstrations(part, tokenizer, system="", max_response_tokens=LONGEST) for part in chosen]
        encoded[task] = (parts[0], parts[1])
    made_from = {
        "file": digest(Path(options.file)),
        "model": digest(Path(options.model) / "model.safetensors"),
        "pairs": len(train),
        "held_out": len(held),
        "trl": trl.__version__,
        "torch": torch.__version__,
    }
    results = {}
    for seed in range(options.seeds):
        for task in options.tasks:
            section = sections(options)[task].model_copy(update={"seed": seed})
            for side in options.sides:
                told = {**made_from, **section.model_dump(mode="json")}
                run = RUNS[task, side]
                result = kept(
                    options.out / f"{task}-{side}-seed{seed}.json",
                    told,
                    lambda run=run, task=task, section=section: run(options.model, *encoded[task], section),
                )
                results[task, side, seed] = result
                shown = {name: value for name, value in result.items() if name != "margins"}
                print(task, side, "seed", seed, json.dumps(shown), flush=True)
    print(summary(results))


if __name__ == "__main__":
    main()
