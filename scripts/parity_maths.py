"""Compares the maths of one fixed batch with TRL's, element by element: `make parity`.

The batch has uneven prompts, early stops, a stop on the last position and responses that never stop. TRL's PPO sums
stand in the middle of its trainer, so the trainer itself runs (parity_watch.py), two epochs on tiny random models in
float64; ours are then computed from the same inputs. Each row of the table tells the gap as it is, and what is left of
it once the differences that are named beside it are undone; docs/parity.md explains those. What is left has to be
rounding, and a difference that is named has to be there, or the exit status is 1. Nothing of TRL's is copied here.
"""

import contextlib
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import tasks  # noqa: F401  first: it switches network and telemetry off before huggingface_hub reads the switches

# isort: split
import torch
import transformers
from parity_watch import (
    CLIP_RANGE,
    KL_COEF,
    OFFSET,
    PENALTY,
    RESPONSE_TOKENS,
    ROWS,
    TEMPERATURE,
    Models,
    Says,
    Watched,
    copy_of,
    fixed_responses,
    make_models,
    stand_in,
    watch_trainer,
)
from torch import Tensor

from rlhf_core.functional import (
    dpo_loss,
    entropy,
    first_true_index,
    gae,
    kl_estimate,
    masked_mean,
    masked_var,
    pairwise_loss,
    policy_loss,
    shape_rewards,
    token_logprobs,
    truncate_at_stop,
    value_loss,
    whiten,
)
from rlhf_core.models import REFERENCE, pack

EXACT, SINGLE = 1e-12, 1e-6  # of float64; and where a float32 stands between, as in our heads and in TRL's logs
NOT_INSTALLED = "TRL is not installed. Run `make parity`, which installs it first."
MINIBATCHES, PIECES_EACH = 2, 2  # what the watched trainer cuts an epoch into

# Every difference that a row of the table names; docs/parity.md explains each.
DIFFERENCES = {
    "pad": "a sampled PAD",
    "temperature": "temperature offset",
    "sampler": "old log-probs from the sampler",
    "later": "score one step later",
    "bessel": "Bessel's correction",
    "boundary": "value after the end",
    "pieces": "mean of means",
    "padding": "padding in the logs",
    "k2": "approx-KL by k2",
    "empty": "empty places in the logs",
    "clipping": "no gradient clipping",
    "steps": "one step for all minibatches",
}


class Row(NamedTuple):
    """One comparison: how many numbers, the largest of TRL's, the gap as it is, and the gap that nothing explains.

    `rest` is None where a difference is shown and cannot be undone.
    """

    what: str
    count: int
    largest: float
    gap: float
    rest: float | None
    named: str
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether nothing but rounding is left, and the difference that is named is there."""
        return (self.rest is None or self.rest <= self.tolerance) and (not self.named or self.gap > self.tolerance)


def compare(
    what: str,
    ours: Tensor,
    theirs: Tensor,
    *,
    undone: Tensor | None = None,
    named: Sequence[str] = (),
    tolerance: float = EXACT,
) -> Row:
    """Ours against TRL's, and where a difference is meant, `undone`: ours as it would be without it."""
    ours, theirs = ours.detach().double(), theirs.detach().double()
    gap = _gap(ours, theirs)
    rest = None if named else gap
    if undone is not None:
        rest = _gap(undone.detach().double(), theirs)
    words = ", ".join(DIFFERENCES[key] for key in named)
    return Row(what, theirs.numel(), theirs.abs().max().item(), gap, rest, words, tolerance)


def _gap(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert theirs.isfinite().all()
    return (ours - theirs).abs().max().item()


def table(rows: Sequence[Row]) -> str:
    """All rows as a markdown table."""
    lines = [
        "| quantity | numbers | largest | gap as it is | left unexplained | difference |",
        "|---|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        rest = "shown only" if row.rest is None else f"{row.rest:.1e}"
        gaps = f"{row.gap:.1e} | {rest}"
        lines.append(f"| {row.what} | {row.count} | {row.largest:.3g} | {gaps} | {row.named or 'none'} |")
    return "\n".join(lines)


# ---- the comparisons


def compare_forward(models: Models, watched: Watched) -> list[Row]:
    """Cutting at the stop, and what the models say of the same tokens: TRL's rows left-padded, ours packed."""
    from trl.experimental.ppo.ppo_trainer import forward, truncate_response
    from trl.experimental.utils import first_true_indices, get_reward
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    seen, pad_id, stop_id = watched.rollout, models.tokenizer.pad_token_id, models.tokenizer.eos_token_id
    ids_BT, mask_BT = truncate_at_stop(seen["responses"], [stop_id], pad_id)
    stops_BT = seen["responses"] == stop_id
    width = seen["queries"].shape[1]  # of the prompts
    raw_BTV = forward(models.reference, seen["query_responses"], pad_id).logits[:, width - 1 : -1]
    offset_BT = token_logprobs(raw_BTV, seen["responses"], temperature=TEMPERATURE + OFFSET)
    plain_BT = token_logprobs(raw_BTV, seen["responses"], temperature=TEMPERATURE)
    prompts = [query[query != pad_id].tolist() for query in seen["queries"]]
    packed = pack(prompts, [row[kept].tolist() for row, kept in zip(ids_BT, mask_BT, strict=True)], pad_id)
    trunk = models.roles.trunk(packed)
    ours_BT, _ = models.roles.logprobs(trunk, REFERENCE, packed.ids_BT, packed.mask_BT, temperature=1.0)
    logits_BTV = forward(models.policy, seen["query_responses"], pad_id).logits[:, width - 1 : -1]
    theirs_BT = selective_log_softmax(logits_BTV, seen["responses"])
    cut_BS = torch.cat([seen["queries"], seen["postprocessed_responses"]], 1)
    _, scores_B, _ = get_reward(models.reward, cut_BS, pad_id, width)
    values_BT = models.roles.values(trunk, "value", packed.mask_BT)
    # A PAD that was sampled, then two more tokens and the stop.
    sampled = torch.tensor([[5, pad_id, 7, stop_id, pad_id]])
    kept = truncate_at_stop(sampled, [stop_id], pad_id)[1].sum()
    found = first_true_indices(truncate_response(stop_id, pad_id, sampled) == pad_id).squeeze()
    return [
        compare("place of the first stop", first_true_index(stops_BT), first_true_indices(stops_BT)),
        compare("ids cut after the stop", ids_BT, seen["postprocessed_responses"]),
        compare("mask of the response", mask_BT, ~seen["padding_mask"]),
        compare("tokens kept of a response that holds a PAD", kept, found, named=["pad"]),
        compare("log-probs, left-padded and packed", ours_BT[mask_BT], theirs_BT[mask_BT]),
        compare(
            "log-probs at temperature 0.7",
            plain_BT[mask_BT],
            seen["ref_logprobs"][mask_BT],
            undone=offset_BT[mask_BT],
            named=["temperature"],
        ),
        compare_sampler(models, seen["queries"]),
        compare("entropy", entropy(logits_BTV, temperature=1.0), entropy_from_logits(logits_BTV)),
        compare("values", values_BT[mask_BT], seen["values"][mask_BT], tolerance=SINGLE),
        compare("score at the last token", models.roles.scores(trunk, "reward"), scores_B, tolerance=SINGLE),
        compare("score less the missing-stop penalty", scores_B - PENALTY * (~stops_BT.any(1)), seen["scores"]),
    ]


def compare_sampler(models: Models, queries: Tensor) -> Row:
    """How far the first ratio is from 1 where old log-probs come from TRL's sampler, in float32 as in training."""
    from transformers import GenerationConfig
    from trl.experimental.ppo.ppo_trainer import batch_generation, forward
    from trl.trainer.utils import selective_log_softmax

    policy, pad_id = copy_of(models.policy).float().eval(), models.tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=RESPONSE_TOKENS, temperature=TEMPERATURE + OFFSET, top_k=0, top_p=1.0, do_sample=True
    )
    torch.manual_seed(3)
    both_BS, logits_BTV = batch_generation(policy, queries, ROWS, pad_id, config)
    ids_BT = both_BS[:, queries.shape[1] :]
    old_BT = selective_log_softmax(logits_BTV, ids_BT)
    with torch.no_grad():
        logits_BTV = forward(policy, both_BS, pad_id).logits[:, queries.shape[1] - 1 : -1] / (TEMPERATURE + OFFSET)
    kept_BT = (ids_BT != pad_id).cumprod(1).bool()
    ratio = (selective_log_softmax(logits_BTV, ids_BT) - old_BT).exp()[kept_BT]
    return compare("first ratio, float32", torch.ones_like(ratio), ratio, named=["sampler"])


def compare_rewards(watched: Watched, whitened: Watched) -> list[Row]:
    """KL, reward of each token, and whitened rewards."""
    seen, other = watched.rollout, whitened.rollout
    mask_BT, longer_BT = ~seen["padding_mask"], ~seen["padding_mask_p1"]
    given = (seen["logprobs"], seen["ref_logprobs"])
    k3_BT = kl_estimate(other["logprobs"], other["ref_logprobs"], estimator="k3")
    before_BT = other["plain_rewards"]
    return [
        compare("KL, k1", kl_estimate(*given, estimator="k1"), seen["kl"]),
        compare("KL, k3", k3_BT, other["kl"]),
        compare(
            "reward of each token",
            shape_rewards(seen["scores"], *given, mask_BT, kl_coef=KL_COEF),
            seen["rewards"],
            undone=shape_rewards(seen["scores"], *given, longer_BT, kl_coef=KL_COEF),
            named=["later"],
        ),
        compare(
            "whitened rewards, from the same rewards and mask",
            whiten(before_BT, longer_BT, shift_mean=False)[longer_BT],
            other["whitened_rewards"][longer_BT],
            undone=_whiten_as_theirs(before_BT, longer_BT, shift_mean=False)[longer_BT],
            named=["bessel"],
            tolerance=SINGLE,
        ),
    ]


def _whiten_as_theirs(values: Tensor, mask: Tensor, *, shift_mean: bool = True) -> Tensor:
    mean, var = masked_mean(values, mask), masked_var(values, mask, unbiased=True)
    return (values - mean) * (var + 1e-8).rsqrt() + (0 if shift_mean else mean)


def compare_advantages(watched: dict[tuple[float, float], Watched]) -> list[Row]:
    """Advantages and returns for several (γ, λ): from the same rewards, and from each side's own."""
    rows = []
    for (gamma, lam), each in watched.items():
        seen, where = each.rollout, f", γ = {gamma:g}, λ = {lam:g}"
        mask_BT, longer_BT = ~seen["padding_mask"], ~seen["padding_mask_p1"]
        rewards_BT = shape_rewards(seen["scores"], seen["logprobs"], seen["ref_logprobs"], mask_BT, kl_coef=KL_COEF)
        own = gae(rewards_BT, seen["values"], mask_BT, gamma=gamma, lam=lam)
        same = gae(seen["rewards"], seen["values"], longer_BT, gamma=gamma, lam=lam)
        # Where nothing is discounted, the score is worth the same a step later: there is nothing to undo.
        meant = gamma * lam < 1
        rows += [
            compare(f"advantages, from the same rewards and mask{where}", same.advantages_BT, seen["plain_advantages"]),
            compare(f"returns, from the same rewards and mask{where}", same.returns_BT, seen["returns"]),
        ]
        for what, mine_BT, theirs_BT, shared_BT in (
            ("advantages", own.advantages_BT, seen["plain_advantages"], same.advantages_BT),
            ("returns", own.returns_BT, seen["returns"], same.returns_BT),
        ):
            undone = {"undone": shared_BT[mask_BT], "named": ["later"]} if meant else {}
            rows.append(compare(f"{what}, from scores on{where}", mine_BT[mask_BT], theirs_BT[mask_BT], **undone))
        undone_BT = _whiten_as_theirs(same.advantages_BT, mask_BT)
        rows.append(
            compare(
                f"whitened advantages, from scores on{where}",
                whiten(own.advantages_BT, mask_BT)[mask_BT],
                seen["whitened_advantages"][mask_BT],
                undone=undone_BT[mask_BT],
                named=["later", "bessel"] if meant else ["bessel"],
                tolerance=SINGLE,
            )
        )
    return rows


def compare_losses(watched: Watched) -> list[Row]:
    """Losses, their gradient at each token, clip fractions and what is logged, over all pieces of both epochs."""
    ours: dict[str, list[Tensor]] = defaultdict(list)
    theirs: dict[str, list[Tensor]] = defaultdict(list)

    def note(name: str, mine: Tensor, other: Tensor) -> None:
        ours[name].append(mine.detach().reshape(-1))
        theirs[name].append(other.detach().reshape(-1))

    def mask_of(piece: int, name: str) -> Tensor:
        return (~watched.rollout[name])[watched.pieces[piece]["micro_batch_inds"]]

    for index, piece in enumerate(watched.pieces):
        mask_BT, longer_BT = mask_of(index, "padding_mask"), mask_of(index, "padding_mask_p1")
        first = index // PIECES_EACH * PIECES_EACH
        place = (index // (MINIBATCHES * PIECES_EACH), first // PIECES_EACH % MINIBATCHES, index - first)
        new_BT = piece["new_logprobs"].requires_grad_()
        given = (new_BT, piece["mb_logprobs"], piece["mb_advantage"], mask_BT)
        policy = policy_loss(*given, clip_range=CLIP_RANGE)
        note("policy loss", policy.loss, piece["pg_loss"])
        note("policy gradient", torch.autograd.grad(policy.loss, new_BT)[0], piece["grad_new_logprobs"])
        note("policy clip", policy.clip_fraction, piece["pg_clipfrac"])
        # TRL adds the means of a minibatch's pieces; ours are sums over the token count of the whole.
        both = sum(int(mask_of(first + part, "padding_mask").sum()) for part in range(PIECES_EACH))
        for name, count in (("weighed", both), ("weighed as theirs", PIECES_EACH * int(mask_BT.sum()))):
            share = policy_loss(*given, clip_range=CLIP_RANGE, token_count=count).loss
            note(name, torch.autograd.grad(share, new_BT)[0], piece["grad_new_logprobs"] / PIECES_EACH)

        every_BT = torch.ones_like(mask_BT)
        k2_BT = kl_estimate(new_BT, piece["mb_logprobs"], estimator="k2")
        note("approx-KL", policy.approx_kl, watched.logged["approxkl_stats"][place])
        note("approx-KL as theirs", masked_mean(k2_BT, every_BT), watched.logged["approxkl_stats"][place])
        padded = (policy.ratio_mean * mask_BT.sum() + (~mask_BT).sum()) / mask_BT.numel()
        note("ratio", policy.ratio_mean, watched.logged["ratio_stats"][place])
        note("ratio as theirs", padded, watched.logged["ratio_stats"][place])
        spread_BT = entropy(piece["logits"], temperature=1.0)
        note("entropy", masked_mean(spread_BT, mask_BT), watched.logged["entropy_stats"][place])
        note("entropy as theirs", spread_BT.mean(), watched.logged["entropy_stats"][place])

        values_BT = piece["vpred"].requires_grad_()
        for name, kept_BT in (("", mask_BT), (" as theirs", longer_BT)):
            value = value_loss(values_BT, piece["mb_values"], piece["mb_return"], kept_BT, clip_range=CLIP_RANGE)
            note(f"value loss{name}", value.loss, piece["vf_loss"])
            note(f"value gradient{name}", torch.autograd.grad(value.loss, values_BT)[0], piece["grad_vpred"])
            note(f"value clip{name}", value.clip_fraction, piece["vf_clipfrac"])

    assert max(theirs["policy clip"]) > 0, "no ratio was clipped, so clipping was not compared"
    assert max(theirs["value clip"]) > 0, "no value was clipped, so clipping was not compared"

    def row(what: str, name: str, *named: str, tolerance: float = EXACT) -> Row:
        undone = torch.cat(ours[f"{name} as theirs"]) if named else None
        mine, other = torch.cat(ours[name]), torch.cat(theirs[name])
        return compare(what, mine, other, undone=undone, named=named, tolerance=tolerance)

    return [
        row("policy loss", "policy loss"),
        row("policy loss, gradient at each token", "policy gradient"),
        row("policy clip fraction", "policy clip", tolerance=SINGLE),
        row("the same gradient, two pieces as a minibatch", "weighed", "pieces"),
        row("value loss", "value loss", "boundary"),
        row("value loss, gradient at each token", "value gradient", "boundary"),
        row("value clip fraction", "value clip", "boundary", tolerance=SINGLE),
        row("approx-KL, as logged", "approx-KL", "k2", "padding", tolerance=SINGLE),
        row("mean ratio, as logged", "ratio", "padding", tolerance=SINGLE),
        row("mean entropy, as logged", "entropy", "padding", tolerance=SINGLE),
    ]


def compare_steps(watched: Watched) -> list[Row]:
    """What the optimiser is asked to do in an update, and what is reported of it."""
    minibatches = torch.tensor(len(watched.pieces) // PIECES_EACH)
    clips, steps = torch.tensor(watched.clip_calls), torch.tensor(len(watched.norms))
    assert min(watched.norms) > 1, "no gradient was long enough to be clipped"
    reported = torch.tensor(watched.metrics["val/ratio"])
    filled = watched.logged["ratio_stats"][:, :, :PIECES_EACH]
    share = filled.numel() / watched.logged["ratio_stats"].numel()
    return [
        compare(
            "mean ratio of the update",
            filled.mean(),
            reported,
            undone=filled.mean() * share,
            named=["empty"],
            tolerance=SINGLE,
        ),
        compare("optimiser steps, 2 epochs of 2 minibatches", minibatches, steps, named=["steps"]),
        compare("gradients clipped to a norm of 1", minibatches, clips, named=["clipping"]),
    ]


def compare_preferences() -> list[Row]:
    """The pairwise loss with and without margin and centring, and DPO's, with the gradient at each input."""
    from trl import DPOTrainer, RewardTrainer

    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows = []
    for what, extra, centre in (
        ("pairwise loss", {}, None),
        ("pairwise loss with margins", {"margin": draw(ROWS).abs()}, None),
        ("pairwise loss, centred", {}, 0.01),
    ):
        scores = (3 * draw(2 * ROWS)).requires_grad_()
        trainer = stand_in(center_rewards_coefficient=centre)
        inputs = {"input_ids": torch.zeros(2 * ROWS, 1), "attention_mask": torch.ones(2 * ROWS, 1), **extra}
        theirs = RewardTrainer.compute_loss(trainer, Says(scores[:, None]), inputs)
        ours = pairwise_loss(*scores.chunk(2), margin=extra.get("margin"), center_coef=centre or 0.0)
        rows += _with_gradient(what, ours, theirs, scores)
    length, vocabulary, beta = 12, 30, 0.1
    ids_BS = torch.randint(0, vocabulary, (2 * ROWS, length), generator=generator)
    first_B1, last_B1 = (
        torch.randint(1, 5, (2 * ROWS, 1), generator=generator),
        torch.randint(6, length, (2 * ROWS, 1), generator=generator),
    )
    place_S = torch.arange(length)
    mask_BS = (place_S >= first_B1) & (place_S <= last_B1)
    logits, ref_logits = (
        (2 * draw(2 * ROWS, length, vocabulary)).requires_grad_(),
        2 * draw(2 * ROWS, length, vocabulary),
    )
    trainer = stand_in(
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=False,
        ref_model=Says(ref_logits),
        beta=beta,
        f_divergence_type="reverse_kl",
        loss_types=["sigmoid"],
        loss_weights=[1.0],
        use_weighting=False,
    )
    inputs = {"input_ids": ids_BS, "attention_mask": torch.ones_like(ids_BS), "completion_mask": mask_BS.long()}
    theirs = DPOTrainer._compute_loss(trainer, Says(logits), inputs, False)
    sums = []
    for given in (logits, ref_logits):
        logprobs_BT = token_logprobs(given[:, :-1], ids_BS[:, 1:], temperature=1.0)
        sums += logprobs_BT.masked_fill(~mask_BS[:, 1:], 0).sum(1).chunk(2)
    return rows + _with_gradient("DPO's loss", dpo_loss(*sums, beta=beta), theirs, logits)


def _with_gradient(what: str, ours: Tensor, theirs: Tensor, inputs: Tensor) -> list[Row]:
    mine, other = (torch.autograd.grad(loss, inputs, retain_graph=True)[0] for loss in (ours, theirs))
    return [compare(what, ours, theirs), compare("its gradient at each input", mine, other)]


def compare_all() -> list[Row]:
    """Every row of the table.

    Raises:
        SystemExit: TRL is not installed.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        import trl  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(NOT_INSTALLED) from error
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        models = make_models(Path(folder))
        tokenizer, vocabulary = models.tokenizer, models.policy.config.vocab_size
        ids_BT = fixed_responses(tokenizer.eos_token_id, tokenizer.pad_token_id, vocabulary)
        # Both discounts at work; TRL's own defaults; and none.
        watched = {
            (g, lam): watch_trainer(models, ids_BT, gamma=g, lam=lam)
            for g, lam in ((0.97, 0.9), (1.0, 0.95), (1.0, 1.0))
        }
        discounted = watched[0.97, 0.9]
        whitened = watch_trainer(models, ids_BT, kl_estimator="k3", whiten_rewards=True)
        return [
            *compare_forward(models, discounted),
            *compare_rewards(discounted, whitened),
            *compare_advantages(watched),
            *compare_losses(discounted),
            *compare_steps(discounted),
            *compare_preferences(),
        ]


def main() -> int:
    """Print the table; 1 where a gap is left unexplained."""
    rows = compare_all()
    print(table(rows))
    left = [row.what for row in rows if not row.holds]
    print(f"\n{len(rows) - len(left)} of {len(rows)} rows hold." + (f" Left over: {', '.join(left)}." if left else ""))
    return int(bool(left))


if __name__ == "__main__":
    sys.exit(main())
