"""Does learning few weights cost quality? PPO as params.yaml has it beside a slower one.

    python scripts/fast_and_slow.py

After `make run`, whose SFT and reward models it takes. PPO is trained anew, with the same updates and seeds, in two
ways:

    fast    as params.yaml has it
    slow    adapters in every layer, and a value network of its own

Prints how often the gold model prefers each policy's answers to SFT's on the held-out prompts, and exits with 1 where
the fast way's are below the slow way's by more than twice the standard error over the seeds. What is done is kept in
.rlhf/fast_and_slow.jsonl, so that the same command goes on. Numbers after the script's name are other seeds. With the
default recipe a seed takes some twenty minutes on two cores.
"""

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from rlhf_core.config import PPO, Params, load_params
from rlhf_core.data import encode_prompt, load_prepared
from rlhf_core.ensemble import load_ensemble
from rlhf_core.evaluate import evaluate_policies
from rlhf_core.models import Roles, load_tokenizer
from rlhf_core.ppo import POLICY, add_roles, train_ppo
from rlhf_core.tracking import NullTracker
from tasks.ppo import SPLITS
from tasks.prepare import BASE, PREPARED
from tasks.progress import ProgressTracker
from tasks.reward import FOLDERS
from tasks.sft import MODEL
from tasks.stage import set_up_torch

SEEDS = (0, 1, 2)
RECORD = Path(".rlhf/fast_and_slow.jsonl")
WAYS: dict[str, dict[str, Any]] = {"fast": {}, "slow": {"lora_layers": 0, "value_network": "own"}}
WIN = "gold_win_rate"


def config_of(way: str, seed: int, params: Params) -> PPO:
    """PPO's values for this way and seed."""
    return params.ppo.model_copy(update={**WAYS[way], "seed": seed, "start": "", "watch_every": 0, "on_alarm": "log"})


def measure(config: PPO, params: Params) -> dict[str, Any]:
    """Train, evaluate, and tell the win rate with its interval, the KL, and the seconds that training took."""
    set_up_torch()
    disable_progress_bar()
    tokenizer, system = load_tokenizer(BASE), params.prepare.system
    prompts = [encode_prompt(tokenizer, one.prompt, system) for one in load_prepared(PREPARED, "prompts", SPLITS)]
    torch.manual_seed(config.seed)
    roles = Roles(MODEL, config)
    add_roles(roles, FOLDERS["reward"], method=config.method, value_network=config.value_network)
    began = time.perf_counter()
    train_ppo(roles, prompts, config, tokenizer=tokenizer, tracker=ProgressTracker("ppo"))
    seconds = time.perf_counter() - began
    tuned = Roles(MODEL)
    with tempfile.TemporaryDirectory() as folder:
        roles.save(POLICY, folder)
        tuned.add("ppo", start=folder)
    for role, saved in FOLDERS.items():
        load_ensemble(tuned, role, saved)
    found = evaluate_policies(
        Roles(BASE), tuned, load_prepared(PREPARED, "prompts", ["test"]),
        load_prepared(PREPARED, "demonstrations", ["test"]), params.evaluate, tokenizer=tokenizer, system=system,
        tracker=NullTracker(), policies=("sft", "ppo"),
    ).metrics  # fmt: skip
    rates = {name: found["ppo_vs_sft"][name] for name in (WIN, f"{WIN}_low", f"{WIN}_high")}
    return {**rates, "kl": found["ppo"]["kl"], "seconds": seconds}


def not_below(rows: Sequence[dict[str, Any]]) -> tuple[bool, str]:
    """Whether the fast way is not below the slow one, seed by seed, and the words for it."""
    wins = {way: {row["seed"]: row[WIN] for row in rows if row["way"] == way} for way in WAYS}
    more = [wins["fast"][seed] - wins["slow"][seed] for seed in wins["fast"]]
    error = stdev(more) / len(more) ** 0.5 if len(more) > 1 else 0.0
    return mean(more) >= -2 * error, (
        f"fast less slow: {100 * mean(more):+.1f} points over {len(more)} seeds, standard error {100 * error:.1f}"
    )


def main() -> int:
    seeds = [int(word) for word in sys.argv[1:]] or SEEDS
    params = load_params()
    RECORD.parent.mkdir(exist_ok=True)
    kept = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.is_file() else []
    rows = []
    for seed in seeds:
        for way in WAYS:
            config = config_of(way, seed, params)
            # What a result hangs on, but for the models.
            settings = {"ppo": config.model_dump(mode="json"), "evaluate": params.evaluate.model_dump(mode="json")}
            row = next((one for one in kept if one["settings"] == settings), None)
            if row is None:
                print(f"{way}, seed {seed}", flush=True)
                row = {"way": way, "seed": seed, **measure(config, params), "settings": settings}
                with RECORD.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            rows.append(row)
    print("\n| way | seed | PPO over SFT, gold | KL, nats | minutes of training |\n|---|---:|---|---:|---:|")
    for row in rows:
        low, high = row[f"{WIN}_low"], row[f"{WIN}_high"]
        print(
            f"| {row['way']} | {row['seed']} | {row[WIN]:.0%} ({low:.0%} to {high:.0%}) | {row['kl']:.1f} | "
            f"{row['seconds'] / 60:.1f} |"
        )
    held, words = not_below(rows)
    print(f"\n{words}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
