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

from rlhf_core.config import Params, load_params
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
from tasks.stage import make_deterministic

SEEDS = (0, 1, 2)
RECORD = Path(".rlhf/fast_and_slow.jsonl")
WAYS: dict[str, dict[str, Any]] = {"fast": {}, "slow": {"lora_layers": 0, "value_network": "own"}}
WIN = "gold_win_rate"


def measure(way: str, seed: int, params: Params) -> dict[str, Any]:
    """Train, evaluate, and tell the win rate with its interval, the KL, and the seconds that training took."""
    config = params.ppo.model_copy(update={**WAYS[way], "seed": seed, "start": "", "watch_every": 0, "on_alarm": "log"})
    tokenizer, system = load_tokenizer(BASE), params.prepare.system
    prompts = [encode_prompt(tokenizer, one.prompt, system) for one in load_prepared(PREPARED, "prompts", SPLITS)]
    torch.manual_seed(seed)
    roles = Roles(MODEL, config)
    add_roles(roles, FOLDERS["reward"], method=config.method, value_network=config.value_network)
    began = time.perf_counter()
    train_ppo(roles, prompts, config, tokenizer=tokenizer, tracker=ProgressTracker(f"{way} {seed}"))
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


def settings(way: str, seed: int, params: Params) -> dict[str, Any]:
    """What a result hangs on, but for the models."""
    chosen = {**params.ppo.model_dump(mode="json"), **WAYS[way], "seed": seed}
    return {"ppo": chosen, "evaluate": params.evaluate.model_dump(mode="json")}


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
    make_deterministic()
    params = load_params()
    RECORD.parent.mkdir(exist_ok=True)
    kept = [json.loads(line) for line in RECORD.read_text().splitlines()] if RECORD.is_file() else []
    rows = []
    print("| way | seed | PPO over SFT, gold | KL, nats | minutes of training |\n|---|---:|---|---:|---:|", flush=True)
    for seed in seeds:
        for way in WAYS:
            known = settings(way, seed, params)
            row = next((one for one in kept if one["settings"] == known), None)
            if row is None:
                row = {"way": way, "seed": seed, **measure(way, seed, params), "settings": known}
                with RECORD.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            rows.append(row)
            print(
                f"| {way} | {seed} | {row[WIN]:.0%} ({row[f'{WIN}_low']:.0%} to {row[f'{WIN}_high']:.0%}) | "
                f"{row['kl']:.1f} | {row['seconds'] / 60:.1f} |",
                flush=True,
            )
    held, words = not_below(rows)
    print(f"\n{words}")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
