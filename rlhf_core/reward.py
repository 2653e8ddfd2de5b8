"""The reward model: a scalar head on the SFT model, trained on rankings (a pair is a ranking of two).

Beside that head, which learns the ranks, it may have one for each axis of the rankings' `scores`, such as helpfulness.

What it measures of itself, and the statistics that are stored with it, come from here too; curves and files do not.
"""

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import processes
from rlhf_core.checkpoints import NO_CHECKPOINTS, Checkpoints, LoopState
from rlhf_core.config import Reward
from rlhf_core.data import encode_prompt, encode_response
from rlhf_core.ensemble import EnsembleScore, combine, members_of, normalise
from rlhf_core.errors import ConfigError
from rlhf_core.functional import masked_mean, plackett_luce_loss, ranking_loss
from rlhf_core.length import LengthTerm, length_correlation
from rlhf_core.models import REFERENCE, Roles, TrunkCache, pad_right
from rlhf_core.optimisation import adamw, copy_into, epochs_of, rate_factor, require_finite, set_rate, step_clipped
from rlhf_core.records import Ranking, Sampled
from rlhf_core.rollouts import sample
from rlhf_core.statistics import (
    LengthBin,
    ReliabilityBin,
    accuracy_by_length_difference,
    calibration_error_by_chance,
    confidence_and_correctness,
    expected_calibration_error,
    fit_temperature,
    longest_wins,
    reliability_bins,
)
from rlhf_core.tracking import Tracker


class EncodedRanking(NamedTuple):
    """Ids of prompt and response for each of K responses, their ranks, and the responses' lengths in tokens."""

    ids: list[list[int]]
    ranks: tuple[int, ...]
    lengths: list[int]
    grades: tuple[float, ...] = ()  # how good each is said to be, () where nothing says it: see `grades_of`
    axes: Mapping[str, Sequence[float]] = MappingProxyType({})  # K scores for each axis that it is scored on


class Judged(NamedTuple):
    """What a reward model says of the pairs of some rankings, ties left out."""

    margins: np.ndarray  # (N,) raw score of the preferred response minus that of the other
    length_differences: np.ndarray  # (N,) tokens, preferred minus other
    rankings: int
    which: tuple[tuple[int, int, int], ...] = ()  # of each pair: ranking, preferred response, other one


Judgements = dict[str | None, Judged]  # under None by the ranks, under each axis by its own scores


def encode_rankings(
    rankings: Sequence[Ranking], tokenizer: PreTrainedTokenizerBase, *, system: str, max_response_tokens: int
) -> list[EncodedRanking]:
    """Rankings as ids, in the template and with the end-of-turn token that rollouts have."""
    encoded = []
    for record in rankings:
        prompt = encode_prompt(tokenizer, record.prompt, system)
        responses = [encode_response(tokenizer, text, limit=max_response_tokens) for text in record.responses]
        lengths = [len(ids) for ids in responses]
        ids = [prompt + response for response in responses]
        encoded.append(EncodedRanking(ids, record.ranks, lengths, grades_of(record), record.scores or {}))
    return encoded


def grades_of(record: Ranking) -> tuple[float, ...]:
    """Numbers whose differences are the margins that the data tells: of a pair its `margin`, else the mean score.

    The mean is over the axes of `scores`. Without either there are no grades, and no margins.
    """
    if record.margin is not None and len(record.ranks) == 2:
        return tuple(record.margin * (rank == min(record.ranks)) for rank in record.ranks)
    return tuple(sum(of_one) / len(of_one) for of_one in zip(*(record.scores or {}).values(), strict=True))


def require_same_axes(saved: Collection[str], config: Reward) -> None:
    """Stop where a model that training goes on from has other axes than those asked for.

    Raises:
        ConfigError: names both.
    """
    if set(saved) != set(config.axes):
        asked, held = (", ".join(axes) or "none" for axes in (config.axes, saved))
        raise ConfigError(
            f"reward.axes asks for {asked}, but what reward.start {config.start} holds has the axes {held}. Set "
            f"reward.axes=[{','.join(saved)}] to go on from it, or reward.start='' to begin at the SFT model."
        )


def score_rankings(
    roles: Roles, role: str, rankings: Sequence[EncodedRanking], pad_id: int, cache: TrunkCache | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K) raw scores, ranks and the mask of real responses, K being the most that any ranking has."""
    outputs_BKH, ranks_BK, mask_BK = outputs_of_rankings(roles, role, rankings, pad_id, cache)
    return outputs_BKH[..., 0], ranks_BK, mask_BK


def outputs_of_rankings(
    roles: Roles, role: str, rankings: Sequence[EncodedRanking], pad_id: int, cache: TrunkCache | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(B, K, 1 + A) raw outputs, score first and then A axes; (B, K) ranks and the mask of real responses."""
    ranks_BK, mask_BK = _padded_rows([ranking.ranks for ranking in rankings])
    rows = [ids for ranking in rankings for ids in ranking.ids]
    found_NH = roles.output_rows(rows, [role], pad_id, cache=cache)[:, 0]
    mask_BK, ranks_BK = mask_BK.to(found_NH.device), ranks_BK.to(found_NH.device)
    outputs_BKH = found_NH.new_zeros((*mask_BK.shape, found_NH.shape[1]))
    return outputs_BKH.masked_scatter(mask_BK[..., None], found_NH), ranks_BK, mask_BK


def axis_ranks(rankings: Sequence[EncodedRanking], axis: str) -> tuple[Tensor, Tensor]:
    """(B, K) ranks by an axis, float, the highest score lowest, and the mask of responses that it scores."""
    width = max(len(ranking.ids) for ranking in rankings)
    ranks_BK, mask_BK = _padded_rows([[-score for score in ranking.axes.get(axis, ())] for ranking in rankings], width)
    return ranks_BK.double(), mask_BK


def ranks_loss(
    scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor, rankings: Sequence[EncodedRanking], config: Reward
) -> Tensor:
    """What the scores of some rankings cost by their ranks, before centring; a scalar."""
    if config.loss == "plackett_luce":
        return plackett_luce_loss(scores_BK, mask_BK, ranks_BK=ranks_BK)
    margins_BKK = (config.margin_coef * margins_of(rankings)).to(scores_BK)
    return ranking_loss(
        scores_BK, mask_BK, ranks_BK=ranks_BK, margins_BKK=margins_BKK, label_smoothing=config.label_smoothing
    )


def axis_loss(
    outputs_BK: Tensor,
    rankings: Sequence[EncodedRanking],
    axis: str,
    config: Reward,
    *,
    added_BK: Tensor | float = 0.0,
) -> Tensor:
    """What an axis's output learns from: its pairs that are not ties, smoothed and centred as the ranks' are.

    Margins are left out, and the pairs are taken with `plackett_luce` too, since scores on an axis are full of ties.

    Args:
        added_BK: (B, K) what length explains beside the outputs; it is not centred.

    Returns:
        A scalar, the mean over the rankings that the axis tells two responses of apart; 0 where there is none.
    """
    ranks_BK, mask_BK = (part.to(outputs_BK.device) for part in axis_ranks(rankings, axis))
    ranked = ranking_loss(outputs_BK + added_BK, mask_BK, ranks_BK=ranks_BK, label_smoothing=config.label_smoothing)
    return ranked + config.center_coef * centering(outputs_BK, ranks_BK, mask_BK)


def length_term(roles: Roles, role: str, rankings: Sequence[EncodedRanking], config: Reward) -> LengthTerm:
    """Length beside a role's score and each of its axes, as far as these rankings alone say what it is worth."""
    ranks_BK, mask_BK = _padded_rows([ranking.ranks for ranking in rankings])

    def on_axis(added_BK: Tensor, *, axis: str) -> Tensor:
        return axis_loss(torch.zeros_like(added_BK), rankings, axis, config, added_BK=added_BK)

    losses = [partial(ranks_loss, ranks_BK=ranks_BK, mask_BK=mask_BK, rankings=rankings, config=config)]
    losses += [partial(on_axis, axis=axis) for axis in roles.axes[role]]
    known = [of.length_coef for of in (roles.normalisers[role], *roles.axes[role].values())]
    return LengthTerm(rankings, losses, known, roles.device)


def margins_of(rankings: Sequence[EncodedRanking]) -> Tensor:
    """(B, K, K) by how much response i is graded above response j, never below 0, and 0 where there are no grades."""
    width = max(len(ranking.ids) for ranking in rankings)
    grades_BK = torch.tensor(
        [[*ranking.grades, *[0.0] * (width - len(ranking.grades))] for ranking in rankings], dtype=torch.float64
    )
    return (grades_BK[:, :, None] - grades_BK[:, None, :]).clamp(min=0)


def centering(scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """Mean over rankings of the mean of (better + worse)² over their pairs that are not ties, as `ranking_loss` weighs.

    It pulls the scores' free constant to 0 (Eisenstein et al. 2023, arXiv:2312.09244).
    """
    better_BKK = _better(ranks_BK, mask_BK)
    sums_BKK = scores_BK[:, :, None] + scores_BK[:, None, :]
    count_B = better_BKK.sum((1, 2))
    mean_B = sums_BKK.square().masked_fill(~better_BKK, 0).sum((1, 2)) / count_B.clamp(min=1)
    return masked_mean(mean_B, count_B > 0)


@torch.no_grad()
def judge_rankings(
    roles: Roles,
    role: str,
    rankings: Sequence[EncodedRanking],
    pad_id: int,
    *,
    size: int = 16,
    cache: TrunkCache | None = None,
) -> Judged:
    """The margins of all pairs that are not ties."""
    return judge_heads(roles, role, rankings, pad_id, size=size, cache=cache)[None]


@torch.no_grad()
def judge_heads(
    roles: Roles,
    role: str,
    rankings: Sequence[EncodedRanking],
    pad_id: int,
    *,
    size: int = 16,
    cache: TrunkCache | None = None,
) -> Judgements:
    """The margins of all pairs that are not ties, by the ranks and by each axis that the role has."""
    own, outputs = processes.own(rankings), []
    for start in range(0, len(own), size):
        outputs_BKH, _, _ = outputs_of_rankings(roles, role, own[start : start + size], pad_id, cache)
        outputs += outputs_BKH.tolist()
    outputs = processes.gather(outputs)
    found: Judgements = {}
    for place, axis in enumerate((None, *roles.axes[role])):
        ranks = [ranking.ranks if axis is None else [-x for x in ranking.axes.get(axis, ())] for ranking in rankings]
        found[axis] = _judged(rankings, ranks, [[heads[place] for heads in of_ranking] for of_ranking in outputs])
    return found


def _judged(
    rankings: Sequence[EncodedRanking], ranks: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]
) -> Judged:
    margins, differences, which = [], [], []
    for row, (ranking, of_row, score) in enumerate(zip(rankings, ranks, scores, strict=True)):
        for i, rank_i in enumerate(of_row):
            for j, rank_j in enumerate(of_row):
                if rank_i < rank_j:
                    margins.append(score[i] - score[j])
                    differences.append(ranking.lengths[i] - ranking.lengths[j])
                    which.append((row, i, j))
    return Judged(np.array(margins), np.array(differences), sum(map(bool, ranks)), tuple(which))


def judge_together(roles: Roles, members: Sequence[str], judged: Sequence[Judgements]) -> Judgements:
    """What the mean of the members' normalised scores says of the pairs that each of them judged, in reward units."""
    found = {}
    for axis, first in judged[0].items():
        normalisers = [roles.normalisers[name] if axis is None else roles.axes[name][axis] for name in members]
        # The means cancel in a margin.
        margins = [each[axis].margins / of.std for each, of in zip(judged, normalisers, strict=True)]
        found[axis] = first._replace(margins=np.mean(margins, axis=0))
    return found


def accuracy(judged: Judged) -> float:
    """Share of pairs whose preferred response scores higher; equal scores count half."""
    return float(((judged.margins > 0) + 0.5 * (judged.margins == 0)).mean())


def accuracy_by_kind(judged: Judged, rankings: Sequence[Ranking]) -> dict[str, dict[str, float]]:
    """Accuracy and number of pairs for each kind of prompt, "none" where it has none, of the rankings judged."""
    kinds = np.array([rankings[row].category or "none" for row, _, _ in judged.which])
    return {
        str(kind): {"accuracy": accuracy(judged._replace(margins=judged.margins[kinds == kind])),
                    "pairs": int((kinds == kind).sum())}
        for kind in np.unique(kinds)
    }  # fmt: skip


def mistakes(judged: Judged, rankings: Sequence[Ranking]) -> list[dict[str, Any]]:
    """The pairs of the rankings judged whose other response scores higher, the worst first."""
    rows = []
    for place in np.argsort(judged.margins, kind="stable"):
        if judged.margins[place] < 0:
            row, preferred, other = judged.which[place]
            record = rankings[row]
            rows.append(
                {
                    "prompt": "\n\n".join(content for _, content in record.prompt),
                    "kind": record.category,
                    "preferred": record.responses[preferred],
                    "scored_higher": record.responses[other],
                    "by": round(-float(judged.margins[place]), 4),
                }
            )
    return rows


def train_reward(
    roles: Roles,
    role: str,
    train: Sequence[EncodedRanking],
    validation: Sequence[EncodedRanking],
    config: Reward,
    *,
    pad_id: int,
    tracker: Tracker,
    prefix: str = "reward",
    cache: TrunkCache | None = None,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
) -> dict[str, Any]:
    """Train a role that has a scalar head, and leave it at the epoch with the best validation loss.

    Where it has axes, the mean of their losses is added to that of the ranks, so that the ranks have half a say however
    many axes there are. The epoch is chosen by the ranks alone. Where length is regressed out, losses are of the score
    with what length adds, and accuracies of the score; what length was worth is left in the role's normalisers.

    Args:
        prefix: first word of the metrics' names, and what the progress line says.
        cache: trunks of rows that were seen before, in another epoch or for another role.
        checkpoints: where a loop that was stopped goes on from.

    Returns:
        Final metrics: `validation_accuracy`, `validation_loss` (the kept epoch's), `best_epoch`, `steps`, `tokens`.

    Raises:
        TrainingDiverged: a score, a loss or a gradient is not finite.
    """
    torch.manual_seed(config.seed)
    order = torch.Generator().manual_seed(config.seed)
    parameters = roles.trainable(role)
    kept = [value.detach().clone() for value in parameters]
    optimiser = adamw(parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    batches = epochs_of(len(train), epochs=config.epochs, batch_size=config.batch_size, generator=order)
    steps = len(batches)
    warmup = round(config.warmup_fraction * steps)
    state = LoopState({"parameters": parameters, "kept": kept}, {"optimiser": optimiser})
    axes = list(roles.axes[role])
    length = length_term(roles, role, train, config) if config.length == "regress" else None
    if length is not None:
        state = LoopState(
            {**state.tensors, "length": [length.betas_H, length.kept_H]},
            {**state.optimisers, "length_optimiser": length.optimiser},
        )
    so_far = checkpoints.restore(state)
    if so_far is None:
        so_far = {"step": 0, "best": float("inf"), "best_epoch": 0, "best_accuracy": 0.0, "tokens": 0}
    for step, batch_of in enumerate(batches[so_far["step"] :], start=so_far["step"] + 1):
        batch = sorted((train[row] for row in batch_of.rows), key=lambda ranking: max(map(len, ranking.ids)))
        factor = rate_factor(step - 1, steps=steps, warmup=warmup, schedule=config.schedule)
        rate = config.learning_rate * factor
        set_rate(optimiser, rate)
        # Each ranking weighs the same, however a batch is cut; one of nothing but ties has no say.
        counted = max(sum(_differ(ranking.ranks) for ranking in batch), 1)
        counted_on = {axis: max(_telling(batch, axis), 1) for axis in axes}
        loss = hits = pairs = 0.0
        on_axes = dict.fromkeys(axes, 0.0)
        own = processes.own(batch)
        for start in range(0, len(own), config.micro_batch_size):
            part = own[start : start + config.micro_batch_size]
            weight = sum(_differ(ranking.ranks) for ranking in part) / counted
            outputs_BKH, ranks_BK, mask_BK = outputs_of_rankings(roles, role, part, pad_id, cache)
            scores_BK = outputs_BKH[..., 0]
            added_BKH = torch.zeros_like(outputs_BKH) if length is None else length.added(part)
            ranked = ranks_loss(scores_BK + added_BKH[..., 0], ranks_BK, mask_BK, part, config)
            centred = centering(scores_BK, ranks_BK, mask_BK)
            require_finite(
                {"A score": outputs_BKH, "The loss": ranked}, where=prefix, batch=partial(_padded, part, pad_id)
            )
            whole = (ranked + config.center_coef * centred) * weight
            for place, axis in enumerate(axes, start=1):
                share = _telling(part, axis) / counted_on[axis]
                found = axis_loss(outputs_BKH[..., place], part, axis, config, added_BK=added_BKH[..., place]) * share
                whole = whole + found / len(axes)
                on_axes[axis] += found.item()
            whole.backward()
            loss += ranked.item() * weight
            right, all_pairs = _count_right(scores_BK.detach(), ranks_BK, mask_BK)
            hits, pairs = hits + right, pairs + all_pairs
        summed = processes.add_up({"loss": loss, "hits": hits, "pairs": pairs})
        on_axes = processes.add_up(on_axes)
        loss = summed["loss"]
        norm = step_clipped(
            optimiser,
            parameters,
            max_grad_norm=config.max_grad_norm,
            where=prefix,
            batch=partial(_padded, batch, pad_id),
        )
        if length is not None:
            length.step(factor, max_grad_norm=config.max_grad_norm, where=prefix, batch=partial(_padded, batch, pad_id))
        worths = {} if length is None else dict(zip((None, *axes), length.worth(), strict=True))
        batch_tokens = sum(len(ids) for ranking in batch for ids in ranking.ids)
        so_far["tokens"] += batch_tokens
        right_share = summed["hits"] / max(summed["pairs"], 1)
        tracker.metrics(
            {
                f"{prefix}/loss": loss,
                f"{prefix}/batch_accuracy": right_share,
                f"{prefix}/grad_norm": norm,
                f"{prefix}/learning_rate": rate,
                **{f"{prefix}/axes/{axis}/loss": value for axis, value in on_axes.items()},
                **({f"{prefix}/length_coef": worths[None]} if worths else {}),
                **{f"{prefix}/axes/{axis}/length_coef": worth for axis, worth in worths.items() if axis is not None},
            },
            step=step,
        )
        note = f"{prefix} loss {loss:.3f}  accuracy {right_share:.2f}"
        tracker.progress(step, steps, unit="steps", tokens=batch_tokens, note=note)
        if batch_of.ends_epoch:
            judged = judge_rankings(roles, role, validation, pad_id, cache=cache)
            explained = judged.margins + worths.get(None, 0.0) * judged.length_differences
            current, current_accuracy = validation_loss(judged._replace(margins=explained)), accuracy(judged)
            tracker.metrics(
                {f"{prefix}/validation_loss": current, f"{prefix}/validation_accuracy": current_accuracy}, step=step
            )
            if current < so_far["best"]:
                so_far |= {"best": current, "best_epoch": batch_of.epoch, "best_accuracy": current_accuracy}
                copy_into(kept, parameters)
                if length is not None:
                    copy_into([length.kept_H], [length.betas_H])
        so_far["step"] = step
        checkpoints.offer(step, state, so_far)
    copy_into(parameters, kept)
    if length is not None:
        copy_into([length.betas_H], [length.kept_H])
        of_score, *of_axes = length.worth()
        roles.normalisers[role] = roles.normalisers[role]._replace(length_coef=of_score)
        for axis, worth in zip(axes, of_axes, strict=True):
            roles.axes[role][axis] = roles.axes[role][axis]._replace(length_coef=worth)
    return {
        "validation_accuracy": so_far["best_accuracy"],
        "validation_loss": so_far["best"],
        "best_epoch": so_far["best_epoch"],
        "steps": steps,
        "tokens": so_far["tokens"],
    }


def validation_loss(judged: Judged) -> float:
    """Mean of −log σ(margin) over the pairs, nats."""
    return float(np.logaddexp(0, -judged.margins).mean())


def _padded(rankings: Sequence[EncodedRanking], pad_id: int) -> dict[str, Tensor]:
    """All responses of some rankings, one below the other."""
    ids_NS, mask_NS = pad_right([ids for ranking in rankings for ids in ranking.ids], pad_id)
    return {"ids_NS": ids_NS, "mask_NS": mask_NS}


def _padded_rows(rows: Sequence[Sequence[float]], width: int = 0) -> tuple[Tensor, Tensor]:
    """(B, K) numbers, 0 past the end of a row, and the mask of those that are there."""
    width = max(width, *map(len, rows))
    mask_BK = torch.tensor([[k < len(row) for k in range(width)] for row in rows])
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows]), mask_BK


def _differ(values: Sequence[float]) -> bool:
    return len(set(values)) > 1


def _telling(rankings: Sequence[EncodedRanking], axis: str) -> int:
    """How many rankings the axis tells two responses of apart."""
    return sum(_differ(ranking.axes.get(axis, ())) for ranking in rankings)


def _better(ranks_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """(B, K, K) bool, True at [b, i, j] where response i is ranked before response j."""
    return (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & mask_BK[:, :, None] & mask_BK[:, None, :]


def _count_right(scores_BK: Tensor, ranks_BK: Tensor, mask_BK: Tensor) -> tuple[float, int]:
    better_BKK = _better(ranks_BK, mask_BK)
    right_BKK = better_BKK & (scores_BK[:, :, None] > scores_BK[:, None, :])
    return float(right_BKK.sum()), int(better_BKK.sum())


class Quality(NamedTuple):
    """How good a reward model is on held-out rankings."""

    metrics: dict[str, float]
    calibration: list[ReliabilityBin]
    calibration_scaled: list[ReliabilityBin]
    by_length: list[LengthBin]
    length_correlation: float


def measure(judged: Judged, temperature: float) -> Quality:
    """Accuracy, calibration before and after temperature scaling, and accuracy by length difference.

    Metrics: `accuracy`, `pairs`, `rankings`, `ece`, `ece_scaled`, `ece_by_chance`, `temperature`, `longest_wins`.
    """
    confidence, correct = confidence_and_correctness(judged.margins)
    scaled, _ = confidence_and_correctness(judged.margins / temperature)
    metrics = {
        "accuracy": accuracy(judged),
        "pairs": len(judged.margins),
        "rankings": judged.rankings,
        "ece": expected_calibration_error(confidence, correct),
        "ece_scaled": expected_calibration_error(scaled, correct),
        "ece_by_chance": calibration_error_by_chance(judged.margins / temperature, judged.which, seed=0),
        "temperature": temperature,
        "longest_wins": longest_wins(judged.length_differences),
    }
    by_length = accuracy_by_length_difference(judged.margins, judged.length_differences, np.ones(len(judged.margins)))
    bins = (reliability_bins(confidence, correct), reliability_bins(scaled, correct))
    return Quality(metrics, *bins, by_length, length_correlation(judged.margins, judged.length_differences))


def temperature_of(judged: Judged) -> float:
    """The temperature that fits the pairs best; fit it on other pairs than those reported on."""
    return fit_temperature(judged.margins, np.ones(len(judged.margins)))


def set_temperatures(roles: Roles, role: str, quality: Quality, axes: Mapping[str, Quality]) -> None:
    """Let the role's normalisers hold the temperatures at which it was measured, overall and on each axis."""
    roles.normalisers[role] = roles.normalisers[role]._replace(temperature=quality.metrics["temperature"])
    for axis, of_axis in axes.items():
        roles.axes[role][axis] = roles.axes[role][axis]._replace(temperature=of_axis.metrics["temperature"])


@torch.no_grad()
def score_samples(roles: Roles, role: str, sampled: Sampled) -> Tensor:
    """(B,) raw scores of sampled responses at their last kept token, by one role."""
    return _outputs_of_samples(roles, [role], sampled)[:, 0, 0]


@torch.no_grad()
def ensemble_scores(roles: Roles, role: str, sampled: Sampled, *, axis: str | None = None) -> EnsembleScore:
    """What a reward ensemble says of responses, and how far its members disagree about each.

    Where they disagree most, they know least, and a person's judgement teaches them most. `spread_B` tells how unsure
    they are of a response's score. How unsure they are of which of two responses is better is the deviation over the
    members of `members_BM[i] - members_BM[j]`: what they agree to misjudge alike in both cancels there.

    Args:
        roles: has the reward model, with its members, as `load_ensemble` adds it.
        axis: whose scores; None for the overall ones.

    Returns:
        `EnsembleScore` in reward units, for all B responses in every process; a spread of 0 where there is one member.
    """
    members = members_of(roles, role)
    scores_BMH = normalise(roles, members, _outputs_of_samples(roles, members, sampled))
    return combine(scores_BMH[..., roles.place_of(role, axis)])


@torch.no_grad()
def _outputs_of_samples(roles: Roles, of_roles: Sequence[str], sampled: Sampled) -> Tensor:
    """(B, M, 1 + A) raw outputs of M roles, the same in every process."""
    rows = [prompt + response for prompt, response in zip(sampled.prompts, sampled.responses(), strict=True)]
    numbers = processes.own(range(len(rows)))
    outputs_BMH = roles.output_rows([rows[row] for row in numbers], of_roles, pad_id=0)
    return processes.place(outputs_BMH, numbers, len(rows))


def normalise_on_samples(
    roles: Roles,
    scored: Sequence[str],
    prompts: Sequence[Sequence[int]],
    *,
    count: int,
    max_tokens: int,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> dict[str, tuple[float, float]]:
    """Mean and standard deviation of each role's raw scores on responses of the SFT policy at temperature 1.

    They become part of the model, in its normaliser and those of its axes, so that a score of 1 means one such
    deviation above what SFT answers.

    Args:
        count: how many of the prompts are answered; drawn at random, since data often comes sorted by kind.

    Returns:
        Mean and deviation of each role's score, axes left out.
    """
    generator = torch.Generator().manual_seed(seed)
    chosen = [prompts[row] for row in torch.randperm(len(prompts), generator=generator)[:count].tolist()]
    sampled = sample(
        roles.language_model(REFERENCE),
        chosen,
        max_tokens=max_tokens,
        temperature=1.0,
        stop_id=tokenizer.eos_token_id,
        pad_id=tokenizer.pad_token_id,
        generator=generator,
    )
    found = {}
    for role, outputs_BH in zip(scored, _outputs_of_samples(roles, scored, sampled).double().unbind(1), strict=True):
        found[role], *of_axes = [
            (output_B.mean().item(), max(output_B.std(correction=0).item(), 1e-6)) for output_B in outputs_BH.T
        ]
        roles.normalisers[role] = roles.normalisers[role]._replace(mean=found[role][0], std=found[role][1])
        for (axis, before), (mean, std) in zip(roles.axes[role].items(), of_axes, strict=True):
            roles.axes[role][axis] = before._replace(mean=mean, std=std)
    return found
