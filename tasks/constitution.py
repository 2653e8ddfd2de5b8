"""Stage constitution: answers to red-team prompts, criticised and revised by principles, become demonstrations.

See rlhf_core/constitution.py. It stands in the dvc.yaml of `rlhf constitution` only (flows/constitution.py).
"""

from contextlib import suppress
from pathlib import Path

from rlhf_core.config import Constitution
from rlhf_core.constitution import Chain, chain_row, count_chains, demonstration_row, load_principles, revise
from rlhf_core.critics import Critic, Draft, EndpointCritic, PolicyCritic, ScriptedCritic
from rlhf_core.data import load_prepared, parse_prompt, read_rows
from rlhf_core.errors import ConfigError, DataError
from rlhf_core.models import REFERENCE, Roles, load_tokenizer
from rlhf_core.records import Message, Prompt
from rlhf_core.safety import CATEGORIES, Told, rates
from tasks.environment import record_folder, state_folder
from tasks.files import write_jsonl
from tasks.prepare import BASE, PREPARED
from tasks.stage import StageRun, require_watched, stage_run

DEMONSTRATIONS = Path("artifacts/constitution/revisions/revisions.jsonl")
CHAINS = Path("artifacts/constitution/chains.jsonl")
RED_TEAM = Path("data/red_team")
SPLITS = ("train", "validation", "gold")  # test measures


def main() -> None:
    with stage_run("constitution", deps=[BASE, PREPARED, RED_TEAM]) as run:
        config = run.params.constitution
        require_watched(run, "constitution.policy", config.policy)
        require_watched(run, "constitution.principles", config.principles)
        principles = load_principles(config.principles)
        prompts = safety_prompts(SPLITS)
        run.log_dataset("red_team", RED_TEAM, prompts=len(prompts))
        topics = _topics()
        policy = speaker(run, config.policy)
        answers = policy.answer(
            [record.prompt for record in prompts], max_tokens=config.response_tokens, note="answers"
        )
        drafts = [
            Draft(record.prompt, record.category, answer, topics.get(record.prompt, ""))
            for record, answer in zip(prompts, answers, strict=True)
        ]
        if config.critic != "policy" and not run.main:  # one process asks whoever else criticises
            return
        critic = open_critic(run, policy)
        chains = revise(drafts, critic, principles, rounds=config.rounds, seed=config.seed)
        kept = [chain for chain in chains if chain.kept]
        if not kept:
            place = state_folder() / CHAINS.name  # what a failed stage leaves among its outputs, DVC takes away
            if run.main:
                write_jsonl(place, map(chain_row, chains))
            raise DataError(
                f"None of {len(chains)} chains came to a revision, so there is nothing to learn. Read the answers in "
                f"{place}, or name another critic: constitution.critic={config.critic} wrote none."
            )
        if run.main:
            write_jsonl(CHAINS, map(chain_row, chains))
            write_jsonl(DEMONSTRATIONS, (demonstration_row(chain, critic.name) for chain in kept))
        run.finish_metrics({**count_chains(chains), **_before_and_after(kept, run)})
        run.table("constitution/chains", [_shown(chain) for chain in chains[:50]], step=0)


def safety_prompts(splits: tuple[str, ...]) -> list[Prompt]:
    """The red-team prompts of some splits, and those that only look alike.

    Raises:
        DataError: there are none, or none of one kind.
    """
    found = [record for record in load_prepared(PREPARED, "prompts", splits) if record.category in CATEGORIES]
    counts = {category: sum(record.category == category for record in found) for category in CATEGORIES}
    if not all(counts.values()):
        raise DataError(
            f"Found {counts} prompts in splits {', '.join(splits)}; expected some of each category. "
            f"Name files with them in prepare.prompts, as `rlhf constitution run` does with {RED_TEAM}."
        )
    return found


def speaker(run: StageRun, folder: str) -> PolicyCritic:
    """The SFT policy of a folder, which answers, and may criticise itself."""
    return PolicyCritic(
        Roles(folder), REFERENCE, run.params.constitution,
        name=folder, tokenizer=load_tokenizer(BASE), system=run.params.prepare.system, tracker=run,
    )  # fmt: skip


def open_critic(run: StageRun, policy: PolicyCritic) -> Critic:
    """Who criticises, by constitution.critic.

    Raises:
        ConfigError: it is section judge, and that is no chat endpoint; or there is no such script.
    """
    config: Constitution = run.params.constitution
    if config.critic == "policy":
        return policy
    if config.critic != "judge":
        return ScriptedCritic(config.critic.removeprefix("script:"))
    if run.params.judge.kind != "endpoint":
        raise ConfigError(
            f"constitution.critic judge needs judge.kind endpoint, found {run.params.judge.kind}: only a chat writes. "
            "Name one with judge.url and judge.model, or take constitution.critic=policy."
        )
    from rlhf_core.feedback.endpoint import Asker

    return EndpointCritic(Asker(run.params.judge, record_folder() / "judge.db", tracker=run))


def _topics() -> dict[tuple[Message, ...], str]:
    """What each red-team prompt is about, for scripts. Stage prepare has said which rows are bad."""
    found = {}
    for path in sorted(RED_TEAM.glob("*.jsonl")):
        for _, row in read_rows(str(path)):
            with suppress(DataError):
                prompt = parse_prompt(row).prompt
                found[prompt] = str(row.get("topic") or "")
    return found


def _before_and_after(chains: list[Chain], run: StageRun) -> dict[str, float]:
    """What the rule of safety.py says of the answers and of their last revisions."""
    found = {}
    for when in ("before", "after"):
        told = [
            Told(chain.prompt[-1][1], chain.category, chain.response if when == "before" else chain.final)
            for chain in chains
        ]
        for name, interval in rates(told, samples=run.params.evaluate.bootstrap_samples, seed=0).items():
            found[f"{name}_{when}"] = interval.mean
    return found


def _shown(chain: Chain) -> dict[str, str]:
    principles = ", ".join(step.principle for step in chain.steps)
    row = {"prompt": chain.prompt[-1][1], "category": chain.category, "principles": principles}
    return {**row, "response": chain.response, "revision": chain.final if chain.kept else ""}


if __name__ == "__main__":
    main()
