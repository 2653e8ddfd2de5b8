"""Rewrites tests/golden: the numbers of a tiny SFT, reward, PPO and DPO run, one after the other, on one thread.

Run it with `make golden` after a change that should move numbers, and review the difference: a change that should not
leaves every file as it is, byte for byte. Numbers have eight significant digits; how fast it went is left out.
"""

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from rlhf_core.config import DPO, PPO, SFT, Reward
from rlhf_core.data import encode_prompt
from rlhf_core.dpo import encode_preferences, train_dpo
from rlhf_core.models import Roles, load_tokenizer
from rlhf_core.ppo import POLICY, REWARD, add_roles, train_ppo
from rlhf_core.records import Demonstration, Ranking
from rlhf_core.reward import (
    encode_rankings,
    judge_rankings,
    measure,
    normalise_on_samples,
    temperature_of,
    train_reward,
)
from rlhf_core.sft import encode_demonstrations, train_sft
from rlhf_core.tiny import make_tiny
from rlhf_core.tracking import MemoryTracker

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
STAGES = ("sft", "reward", "ppo", "dpo")
# Uneven prompts, answers and rankings, a tie, and a system turn.
ASKED = (
    ("Why is the sky blue?", "Air scatters blue light more than red.", "It is green.", "No idea, ask someone else."),
    ("Name a fruit.", "A banana.", "A stone is a fruit that grows on trees.", "Fruit."),
    ("How many legs has a spider?", "Eight.", "Two, like every bird that swims.", "Six."),
    ("Say hello to my neighbour, please.", "Hello, dear neighbour!", "No.", "Go away."),
    ("What is two and two?", "Four.", "Five, or six on Sundays.", "Two."),
    ("Is the sea salty?", "Yes, from rivers that wash salt out of the land.", "No.", "Perhaps."),
)
SYSTEM = "Be brief."
SHARED = {
    "seed": 0,
    "method": "lora",
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_layers": 1,
    "micro_batch_size": 2,
    "schedule": "cosine",
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
}
SUPERVISED = {**SHARED, "learning_rate": 0.03, "epochs": 8, "batch_size": 3, "warmup_fraction": 0.25}
SFT_SECTION = SFT.model_validate({**SUPERVISED, "keep": "best", "feedback": "", "weights": {}})
REWARD_SECTION = Reward.model_validate(
    {
        **SUPERVISED,
        "loss": "pairs",
        "label_smoothing": 0.0,
        "margin_coef": 0.0,
        "center_coef": 0.01,
        "length": "ignore",
        "norm_samples": 6,
        "axes": [],
        "members": 1,
        "start": "",
        "feedback": "",
        "weights": {},
    }
)
DPO_SECTION = DPO.model_validate({**SUPERVISED, "learning_rate": 0.005, "beta": 0.1, "label_smoothing": 0.1})
PPO_SECTION = PPO.model_validate(
    {
        **SHARED,
        "updates": 3,
        "rollouts": 8,
        "samples_per_prompt": 2,
        "response_tokens": 12,
        "temperature": 0.9,
        "epochs": 2,
        "minibatch_size": 4,
        "learning_rate": 0.01,
        "value_learning_rate": 0.01,
        "warmup_updates": 1,
        "value_warmup_updates": 1,
        "kl_controller": "adaptive",
        "kl_coef": 0.05,
        "kl_penalty": "reward",
        "kl_estimator": "k1",
        "kl_target": 1.0,
        "kl_horizon": 100,
        "clip_range": 0.2,
        "dual_clip": 0.0,
        "entropy_coef": 0.0,
        "value_clip_range": 0.2,
        "value_network": "own",
        "value_coef": 0.1,
        "gamma": 1.0,
        "lam": 0.95,
        "whiten_advantages": True,
        "whiten_rewards": False,
        "scale_scores": False,
        "score_clip": 5.0,
        "spread_coef": 0.0,
        "reward": "reward",
        "objective": "score",
        "axis_weights": {},
        "axis_order": [],
        "thresholds": {},
        "cost_axis": "",
        "cost_limit": 0.0,
        "lambda_init": 1.0,
        "lambda_min": 0.05,
        "lambda_max": 20.0,
        "lambda_learning_rate": 0.2,
        "cost_memory": 4,
        "missing_eos_penalty": 1.0,
        "early_stop_kl": 10.0,
        "start": "",
        "length_penalty": 0.0,
        "length_free": 0,
        "watch_every": 0,
        "watch_window": 8,
        "on_alarm": "log",
    }
)


def measure_all(folder: Path) -> dict[str, dict[str, Any]]:
    """Train the stages under `folder`; final metrics and history of each."""
    torch.set_num_threads(1)
    make_tiny(folder / "base", [text for row in ASKED for text in row])
    _sharpen(folder / "base")
    tokenizer = load_tokenizer(folder / "base")
    pad_id = tokenizer.pad_token_id
    demonstrations = [Demonstration((("user", prompt),), best) for prompt, best, *_ in ASKED]
    rankings = [
        Ranking((("user", prompt),), tuple(answers), (1, 2, 2 + n % 2)) for n, (prompt, *answers) in enumerate(ASKED)
    ]
    prompts = [encode_prompt(tokenizer, record.prompt, SYSTEM) for record in demonstrations]
    options = {"system": SYSTEM, "max_response_tokens": 24}
    found = {}

    tracker, roles = MemoryTracker(), Roles(folder / "base", SFT_SECTION)
    torch.manual_seed(SFT_SECTION.seed)
    roles.add(POLICY)
    examples = encode_demonstrations(demonstrations, tokenizer, **options)
    final = train_sft(roles, examples[:4], examples[4:], SFT_SECTION, pad_id=pad_id, tracker=tracker)
    roles.save(POLICY, folder / "sft")
    found["sft"] = _numbers(final, tracker)

    tracker, roles = MemoryTracker(), Roles(folder / "sft", REWARD_SECTION)
    torch.manual_seed(REWARD_SECTION.seed)
    roles.add(REWARD, head=True)
    encoded = encode_rankings(rankings, tokenizer, **options)
    final = train_reward(roles, REWARD, encoded[:4], encoded[4:], REWARD_SECTION, pad_id=pad_id, tracker=tracker)
    judged = judge_rankings(roles, REWARD, encoded, pad_id)
    normal = normalise_on_samples(
        roles, [REWARD], prompts, count=len(prompts), max_tokens=8, tokenizer=tokenizer, seed=REWARD_SECTION.seed
    )
    mean, std = normal[REWARD]
    roles.normalisers[REWARD] = roles.normalisers[REWARD]._replace(mean=mean, std=std)
    roles.save(REWARD, folder / "reward")
    quality = measure(judged, temperature_of(judged)).metrics
    found["reward"] = _numbers({**final, **quality, "mean": mean, "std": std}, tracker)

    tracker, roles = MemoryTracker(), Roles(folder / "sft", PPO_SECTION)
    torch.manual_seed(PPO_SECTION.seed)
    add_roles(roles, str(folder / "reward"), method=PPO_SECTION.method)
    final, shown = train_ppo(roles, prompts, PPO_SECTION, tokenizer=tokenizer, tracker=tracker)
    found["ppo"] = {**_numbers(final, tracker), "responses": [row["response"] for row in shown]}

    tracker, roles = MemoryTracker(), Roles(folder / "sft", DPO_SECTION)
    torch.manual_seed(DPO_SECTION.seed)
    roles.add(POLICY)
    preferences = encode_preferences(rankings, tokenizer, **options)
    final = train_dpo(roles, preferences[:4], preferences[4:], DPO_SECTION, pad_id=pad_id, tracker=tracker)
    found["dpo"] = _numbers(final, tracker)
    return found


def _sharpen(base: Path) -> None:
    """Let a random model have likely and unlikely tokens, so that it can learn to end its turns."""
    weights = load_file(base / "model.safetensors")
    save_file(
        {name: value * 10 if value.dim() == 2 else value for name, value in weights.items()},
        base / "model.safetensors",
        {"format": "pt"},
    )


def _numbers(final: dict[str, Any], tracker: MemoryTracker) -> dict[str, Any]:
    return {
        "final": {name: _rounded(value) for name, value in sorted(final.items())},
        "history": [
            {
                "step": step,
                **{name: _rounded(value) for name, value in sorted(values.items()) if not name.endswith("_per_second")},
            }
            for step, values in tracker.history
        ],
    }


def _rounded(value: float) -> float:
    return float(f"{value:.8g}") if isinstance(value, float) else value


def main() -> None:
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for stage, content in measure_all(Path(folder)).items():
            text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
            path = GOLDEN / f"{stage}.json"
            same = path.is_file() and path.read_text(encoding="utf-8") == text
            path.write_text(text, encoding="utf-8")
            print(f"{path.relative_to(GOLDEN.parents[1])}  {'as it was' if same else 'rewritten'}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
    main()
