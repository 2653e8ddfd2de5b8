"""Stage reward: the reward model that PPO climbs, and the gold one that only judges. See rlhf_core/reward.py.

Both start from the SFT model and are trained in the same way, on rankings of different prompts.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rlhf_core.config import Reward
from rlhf_core.data import encode_prompt, load_prepared
from rlhf_core.ensemble import add_members, member_names, member_seed, members_of, save_ensemble
from rlhf_core.mixing import count_sources, load_rankings
from rlhf_core.models import Roles, TrunkCache, load_tokenizer
from rlhf_core.reward import (
    Judgements,
    Quality,
    accuracy_by_kind,
    encode_rankings,
    judge_heads,
    judge_together,
    measure,
    mistakes,
    normalise_on_samples,
    require_same_axes,
    set_temperatures,
    temperature_of,
    train_reward,
)
from tasks.files import write_csv, write_jsonl
from tasks.prepare import BASE, PREPARED
from tasks.sft import MODEL as SFT_MODEL
from tasks.stage import require_watched, stage_run

FOLDERS = {"reward": "artifacts/reward/model", "gold": "artifacts/reward/gold"}
MISTAKES = Path("artifacts/reward/mistakes.jsonl")
SHOWN_MISTAKES = 50  # in MLflow's table
MEASURED_ON = ("validation", "test")  # where its temperature is fitted, and where it is measured
PREFIX = {"reward": "reward", "gold": "reward/gold"}


def main() -> None:
    with stage_run("reward", deps=[BASE, SFT_MODEL, PREPARED]) as run:
        config, prepare = run.params.reward, run.params.prepare
        require_watched(run, "reward.start", config.start)
        require_watched(run, "reward.feedback", config.feedback)
        tokenizer = load_tokenizer(BASE)
        pad_id = int(tokenizer.pad_token_id)
        records = load_rankings(config, PREPARED)
        rankings = {
            split: encode_rankings(
                of_split,
                tokenizer,
                system=prepare.system,
                max_response_tokens=prepare.max_response_tokens,
            )
            for split, of_split in records.items()
        }
        counts: dict[str, Any] = {f"rankings_{split}": len(rows) for split, rows in rankings.items()}
        run.log_dataset("prepared", PREPARED, **counts)
        torch.manual_seed(config.seed)
        roles, cache = Roles(SFT_MODEL, config), TrunkCache()
        add_models(roles, config)
        final: dict[str, dict[str, Any]] = {}
        judged = {}
        for role, split, prefix, seed in _trained(config):
            final[role] = {}
            if role != "gold" or not config.start:  # a judge that is taken over learns no more
                final[role] = train_reward(
                    roles, role, rankings[split], rankings["validation"], config.model_copy(update={"seed": seed}),
                    pad_id=pad_id, tracker=run, prefix=prefix, cache=cache, checkpoints=run.checkpoints.below(role),
                )  # fmt: skip
            judged[role] = [judge_heads(roles, role, rankings[of], pad_id, cache=cache) for of in MEASURED_ON]
        prompts = load_prepared(PREPARED, "prompts", ["train", "validation"])
        statistics = normalise_on_samples(
            roles,
            list(final),
            [encode_prompt(tokenizer, record.prompt, prepare.system) for record in prompts],
            count=config.norm_samples,
            max_tokens=prepare.max_response_tokens,
            tokenizer=tokenizer,
            seed=config.seed,
        )
        qualities = {}
        for role, (mean, std) in statistics.items():
            qualities[role], axes = _qualities(*judged[role])
            set_temperatures(roles, role, qualities[role], axes)
            numbers = _with_length(_numbers(qualities[role], axes), roles, role)
            final[role] = {**numbers, **final[role], "score_mean": mean, "score_std": std}
        members = members_of(roles, "reward")
        together, test = final["reward"], judged["reward"][1]
        if len(members) > 1:
            of_ensemble = [judge_together(roles, members, [judged[name][i] for name in members]) for i in range(2)]
            qualities["reward"], axes = _qualities(*of_ensemble)
            numbers = _with_length(_numbers(qualities["reward"], axes), roles, "reward")
            together, test = {**together, **numbers}, of_ensemble[1]
        if run.main:
            save_ensemble(roles, "reward", FOLDERS["reward"], temperature=together["temperature"])
            if config.start:  # to the byte, or its scores would not be those of before
                shutil.copytree(Path(config.start, "gold"), FOLDERS["gold"], dirs_exist_ok=True)
            else:
                roles.save("gold", FOLDERS["gold"])
        metrics = {**together, "gold": final["gold"]}
        if len(members) > 1:
            metrics["members"] = {str(number): final[name] for number, name in enumerate(members, start=1)}
        metrics["accuracy_by_length"] = {
            f"{part.low:+.0f}_to_{part.high:+.0f}": {"accuracy": part.accuracy, "pairs": part.pairs}
            for part in qualities["reward"].by_length
        }
        metrics["accuracy_by_kind"] = accuracy_by_kind(test[None], records["test"])
        if config.feedback or config.weights:
            metrics["sources"] = count_sources(records["train"])
        wrong = mistakes(test[None], records["test"])
        run.finish_metrics(metrics)
        run.table("reward/mistakes", wrong[:SHOWN_MISTAKES], step=0)
        if run.main:
            write_jsonl(MISTAKES, wrong)
            write_csv(Path("plots/calibration.csv"), _calibration({role: qualities[role] for role in FOLDERS}))
        run.register_model("reward", FOLDERS["reward"], together)
        run.register_model("gold", FOLDERS["gold"], final["gold"])


def add_models(roles: Roles, config: Reward) -> None:
    """Add the reward model with its members and the gold one: fresh, or as saved in config.start.

    Raises:
        ConfigError: what is saved there has other axes than config.axes.
    """
    for role, folder in FOLDERS.items():
        if config.start:
            roles.add(role, head=True, start=Path(config.start, Path(folder).name))
            require_same_axes(roles.axes[role], config)
        else:
            roles.add(role, method=config.method, head=True, axes=config.axes)
    add_members(roles, "reward", config, start=Path(config.start, "model") if config.start else None)


def _trained(config: Reward) -> list[tuple[str, str, str, int]]:
    """Role, split, first words of its metrics and seed of each model; the reward model and gold first, as if alone."""
    further = enumerate(member_names("reward", config.members)[1:], start=2)
    return [
        ("reward", "train", PREFIX["reward"], config.seed),
        ("gold", "gold", PREFIX["gold"], config.seed),
        *((name, "train", f"reward/members/{number}", member_seed(config.seed, number)) for number, name in further),
    ]


def _qualities(validation: Judgements, test: Judgements) -> tuple[Quality, dict[str, Quality]]:
    """Of the score, and of each axis, on the test split, at the temperature that fits the validation split."""
    found = {axis: measure(test[axis], temperature_of(validation[axis])) for axis in test}
    return found[None], {axis: quality for axis, quality in found.items() if axis is not None}


def _numbers(quality: Quality, axes: dict[str, Quality]) -> dict[str, Any]:
    found = {**quality.metrics, "length_correlation": quality.length_correlation}
    return {**found, "axes": {axis: _numbers(of_axis, {}) for axis, of_axis in axes.items()}} if axes else found


def _with_length(numbers: dict[str, Any], roles: Roles, role: str) -> dict[str, Any]:
    """The numbers, and what length was worth beside the score and each axis where it was regressed out."""
    for found, normaliser in [
        (numbers, roles.normalisers[role]),
        *((numbers["axes"][axis], of_axis) for axis, of_axis in roles.axes[role].items()),
    ]:
        if normaliser.length_coef is not None:
            found["length_coef"] = normaliser.length_coef
    return numbers


def _calibration(qualities: Mapping[str, Quality]) -> list[dict[str, Any]]:
    """One row a bin of confidence, for both models, before and after temperature scaling."""
    rows: list[dict[str, Any]] = []
    for role, quality in qualities.items():
        for scaled, bins in ((False, quality.calibration), (True, quality.calibration_scaled)):
            rows += [{"model": role, "scaled": int(scaled), **part._asdict()} for part in bins]
    return rows


if __name__ == "__main__":
    main()
