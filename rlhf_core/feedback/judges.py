"""Opens the judge that section `judge` of params.yaml describes, and lets none judge that is not good enough."""

from collections.abc import Sequence
from pathlib import Path

from rlhf_core.config import Judge, Prepare
from rlhf_core.errors import JudgeRefused
from rlhf_core.feedback.annotators import Annotator, rule
from rlhf_core.feedback.pairs import PairwiseJudge
from rlhf_core.feedback.quality import Quality, check_judge
from rlhf_core.records import Ranking
from rlhf_core.tracking import Tracker

ANYWAY = "`rlhf run -S judge.bar=0`"


def open_judge(
    config: Judge, prepare: Prepare, *, memory: str | Path, tracker: Tracker | None = None, backoff: float = 1.0
) -> Annotator:
    """The judge of a kind, ready to rank.

    Args:
        prepare: what a reward model was trained with.
        memory: the SQLite file in which an endpoint's judgements are kept.
        tracker: where its progress line goes.
        backoff: seconds before an endpoint's first retry.

    Raises:
        ConfigError: there is no such rule, a model without the labels, or a key on an unencrypted way.
        MissingArtifact: the folder holds no model.
    """
    if config.kind == "rule":
        return rule(config.model, seed=config.seed)
    if config.kind == "endpoint":
        from rlhf_core.feedback.endpoint import EndpointComparer

        return PairwiseJudge(EndpointComparer(config, Path(memory), tracker=tracker, backoff=backoff))
    from rlhf_core.feedback.local import LabelComparer, RewardJudge

    if config.kind == "local":
        return PairwiseJudge(LabelComparer(config.model, tracker=tracker))
    return RewardJudge(
        config.model, system=prepare.system, max_response_tokens=prepare.max_response_tokens, tracker=tracker
    )


def admit(judge: Annotator, rankings: Sequence[Ranking], config: Judge, *, anyway: str = ANYWAY) -> Quality:
    """Measure a judge on rankings whose answer is known, and turn it away if it does not reach the bar.

    What an endpoint says here is kept, so that measuring it a second time costs nothing.

    Args:
        anyway: what takes it all the same, for the message.

    Raises:
        JudgeRefused: the lower end of its agreement is below `judge.bar`.
        DataError: no ranking prefers anything.
    """
    quality = check_judge(judge, rankings, pairs=config.check_pairs, seed=config.seed)
    if quality.agreement.low < config.bar:
        raise JudgeRefused(refusal(judge.name, quality, config.bar, anyway))
    return quality


def refusal(name: str, quality: Quality, bar: float, anyway: str = ANYWAY) -> str:
    """Why a judge is turned away, and what can be done."""
    found = quality.agreement
    return (
        f"The judge {name} agrees with {found.mean:.1%} of {quality.pairs} known answers (95 % interval "
        f"{found.low:.1%} to {found.high:.1%}); expected a lower end of {bar:.1%} (judge.bar). "
        f"Take a better judge, or take this one all the same: {anyway}."
    )


def counts_of(judge: Annotator) -> dict[str, float]:
    """What a judge that compares counted so far, as metrics; nothing of another."""
    return (
        {f"judge/{name}": count for name, count in judge.counts().items()} if isinstance(judge, PairwiseJudge) else {}
    )
