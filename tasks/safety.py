"""Stage safety: what the policies do with held-out red-team prompts, before and after; and a page with the chains.

And whether the reward model, which PPO climbed, prefers declining where it should.

See rlhf_core/safety.py. It stands in the dvc.yaml of `rlhf constitution` only (flows/constitution.py).
"""

from pathlib import Path
from typing import Any

import torch

from rlhf_core.data import encode_prompt, read_rows
from rlhf_core.ensemble import load_ensemble
from rlhf_core.models import REFERENCE, Roles, load_tokenizer
from rlhf_core.records import Prompt
from rlhf_core.reward import ensemble_scores
from rlhf_core.rollouts import sample
from rlhf_core.safety import Told, changes, numbers, prefers_declining
from rlhf_core.safety_page import write_safety_page
from tasks.constitution import CHAINS, safety_prompts
from tasks.dpo import NO_POLICY
from tasks.dpo import POLICY_FOLDER as DPO_FOLDER
from tasks.files import write_jsonl
from tasks.ppo import POLICY_FOLDER
from tasks.prepare import BASE, PREPARED
from tasks.reward import FOLDERS as REWARD_FOLDERS
from tasks.sft import MODEL as SFT_MODEL
from tasks.stage import StageRun, require_watched, stage_run

FOLDER = Path("artifacts/safety")
BEFORE = "before"  # the SFT policy whose answers were revised
ROWS = 64  # prompts answered at once


def main() -> None:
    deps: list[str | Path] = [BASE, SFT_MODEL, REWARD_FOLDERS["reward"], POLICY_FOLDER, DPO_FOLDER, PREPARED, CHAINS]
    with stage_run("safety", deps=deps) as run:
        config, params = run.params.evaluate, run.params
        require_watched(run, "constitution.policy", params.constitution.policy)
        prompts = safety_prompts(("test",))
        run.log_dataset("prepared", PREPARED, context="evaluation", prompts=len(prompts))
        tuned = Roles(SFT_MODEL)
        tuned.add("ppo", start=POLICY_FOLDER)
        after = {"sft": REFERENCE, "ppo": "ppo"}
        if not NO_POLICY.is_file():
            tuned.add("dpo", start=DPO_FOLDER)
            after["dpo"] = "dpo"
        load_ensemble(tuned, "reward", REWARD_FOLDERS["reward"])
        found = {BEFORE: _answers(run, Roles(params.constitution.policy), REFERENCE, prompts, BEFORE, judge=tuned)}
        for name, role in after.items():
            found[name] = _answers(run, tuned, role, prompts, name, judge=tuned)
        told = {name: answers for name, (answers, _) in found.items()}
        scores = [score for _, of_policy in found.values() for score in of_policy]
        options = {"samples": config.bootstrap_samples, "seed": config.seed}
        metrics: dict[str, Any] = {name: numbers(answers, **options) for name, answers in told.items()}
        for name in after:
            changed = changes(told[BEFORE], told[name], **options)
            metrics[f"{name}_vs_before"] = {
                f"{rate}{end}": value
                for rate, interval in changed.items()
                for end, value in zip(("", "_low", "_high"), interval, strict=True)
            }
        everything = [one for answers in told.values() for one in answers]
        metrics["prefers_declining"] = prefers_declining(everything, scores, **options)
        if not run.main:
            return
        rows = [
            {
                "policy": name,
                "prompt": one.prompt,
                "category": one.category,
                "response": one.response,
                "label": one.label,
            }
            for name, answers in told.items()
            for one in answers
        ]
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_jsonl(FOLDER / "answers.jsonl", rows)
        run.table("safety/answers", rows[:200], step=0)
        chains = [row for _, row in read_rows(str(CHAINS))]
        write_safety_page(FOLDER / "report.html", metrics, chains, told)
        run.finish_metrics(metrics)
        print(f"safety   the page with rates and chains is {FOLDER / 'report.html'}", flush=True)


def _answers(
    run: StageRun, roles: Roles, role: str, prompts: list[Prompt], name: str, *, judge: Roles
) -> tuple[list[Told], list[float]]:
    """Sampled as stage evaluate samples; every policy draws the same random numbers. And what the reward model says."""
    config, tokenizer = run.params.evaluate, load_tokenizer(BASE)
    encoded = [encode_prompt(tokenizer, record.prompt, run.params.prepare.system) for record in prompts]
    generator = torch.Generator().manual_seed(config.seed)
    found: list[Told] = []
    scores: list[float] = []
    for turn in range(config.samples_per_prompt):
        for start in range(0, len(prompts), ROWS):
            answers = sample(
                roles.language_model(role),
                encoded[start : start + ROWS],
                max_tokens=config.response_tokens,
                temperature=config.temperature,
                stop_id=tokenizer.eos_token_id,
                pad_id=tokenizer.pad_token_id,
                generator=generator,
            )
            scores += ensemble_scores(judge, "reward", answers).score_B.tolist()
            for record, ids in zip(prompts[start : start + ROWS], answers.responses(), strict=True):
                text = str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
                found.append(Told(record.prompt[-1][1], record.category, text))
        run.progress(turn + 1, config.samples_per_prompt, unit="passes", note=name)
    return found, scores


if __name__ == "__main__":
    main()
