"""Proximal policy optimisation of the SFT policy against the reward model, with a value baseline and a KL penalty.

Schulman et al. 2017 (arXiv:1707.06347) in the form of Ziegler et al. 2019 and Ouyang et al. 2022: a response is an
episode, a token is an action, the reward model's score comes with the last token, and each token pays for leaving the
SFT policy. The loop below is the whole algorithm; read it from top to bottom.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_core import processes
from rlhf_core.alarm import LOWERED, alarm_now
from rlhf_core.checkpoints import NO_CHECKPOINTS, Checkpoints, LoopState
from rlhf_core.config import PPO, ValueNetwork
from rlhf_core.ensemble import load_ensemble, member_scores, members_of
from rlhf_core.errors import ConfigError
from rlhf_core.folding import batches
from rlhf_core.functional import (
    AdaptiveKL,
    FixedKL,
    RunningMoments,
    constrained_advantages,
    gae,
    kl_estimate,
    masked_mean,
    masked_var,
    policy_loss,
    shape_rewards,
    value_loss,
    whiten,
)
from rlhf_core.models import REFERENCE, Normaliser, Roles, pack
from rlhf_core.objectives import as_outputs, multiplier_of, require_axes, worth_of
from rlhf_core.optimisation import adamw, rate_factor, require_finite, set_rate, step_clipped
from rlhf_core.records import Rollouts, Sampled
from rlhf_core.rollouts import sample
from rlhf_core.tracking import Tracker
from rlhf_core.watch import GOLD, MEASURED, Kept, final_watched, measure_watched

POLICY, VALUE, REWARD = "policy", "value", "reward"
COST = "cost"  # the value model's second head, where a cost is limited
Score = Callable[[Sampled], Tensor | Mapping[str, Tensor]]  # (B,) float, one score a response; or such by axis
SHOWN_SAMPLES = 4  # responses an update that go to the table


class Measured(NamedTuple):
    """Rollouts, and what the sampling alone tells: metrics and, in order, each response's score."""

    rollouts: Rollouts  # the rows of this process; all of them, where there is but one
    metrics: dict[str, float]
    scores_B: Tensor


def add_roles(
    roles: Roles,
    reward_folder: str,
    *,
    method: str,
    start: str = "",
    cost_axis: str = "",
    value_network: ValueNetwork = "own",
) -> None:
    """Give the SFT model PPO's roles: a fresh policy, a frozen reward model, and a value model begun from that.

    Of a reward model with several members, the value model begins from the first.

    Args:
        start: a folder with policy/ and value/ of an earlier run, to continue from those.
        cost_axis: the axis of the reward model whose cost is limited; the value model then has a head for that too.
        value_network: shared leaves the value model no more than its head, on the policy; afresh it begins at 0.

    Raises:
        ConfigError: the reward model has no such axis, or the earlier run had the other value_network.
    """
    roles.add(POLICY, method=method, start=f"{start}/policy" if start else None)
    load_ensemble(roles, REWARD, reward_folder)
    begun = f"{start}/value" if start else reward_folder
    if start:
        _require_network(Path(begun), value_network)
    on = POLICY if value_network == "shared" else None
    roles.add(VALUE, head=True, start=begun, axes=None if start and cost_axis else (), on=on)
    if cost_axis and COST not in roles.axes[VALUE]:
        _add_cost_head(roles, cost_axis)
    if start:
        return
    # The value model predicts normalised scores: fold the normalisation into its head, once.
    mean, std, *_ = roles.normalisers[REWARD]
    with torch.no_grad():
        head: Any = roles.heads[VALUE]
        head.weight.div_(std)
        head.bias.sub_(mean).div_(std)
        if on is not None:  # on hidden states that it was not trained on it would be worse than no baseline
            for parameter in roles.trainable(VALUE):
                parameter.zero_()
    roles.normalisers[VALUE] = Normaliser()


def _require_network(folder: Path, wanted: ValueNetwork) -> None:
    """Refuse a value model that another body's hidden states have taught."""
    body = any((folder / name).is_file() for name in ("adapter_config.json", "config.json"))
    found = "own" if body else "shared"
    if folder.is_dir() and found != wanted:
        raise ConfigError(
            f"ppo.start holds a run with value_network {found}, expected {wanted}: {folder.as_posix()} is "
            f"{'a model of its own' if body else 'a head alone'}. Set ppo.value_network to {found}."
        )


@torch.no_grad()
def _add_cost_head(roles: Roles, axis: str) -> None:
    """The value model's second head begins as the reward model's on the axis: normalised, and with the sign turned."""
    if axis not in roles.axes[REWARD]:
        held = ", ".join(roles.axes[REWARD]) or "none"
        raise ConfigError(f"ppo.cost_axis names {axis!r}; expected an axis of the reward model: {held}.")
    place, (mean, std, *_) = list(roles.axes[REWARD]).index(axis), roles.axes[REWARD][axis]
    heads: Any = roles.axis_heads[REWARD]
    row = slice(place, place + 1)
    roles.add_axis(VALUE, COST, -heads.weight[row] / std, (mean - heads.bias[row]) / std)


def train_ppo(
    roles: Roles,
    prompts: Sequence[Sequence[int]],
    config: PPO,
    *,
    tokenizer: PreTrainedTokenizerBase,
    tracker: Tracker,
    checkpoints: Checkpoints = NO_CHECKPOINTS,
    score: Score | None = None,
    gold: Callable[[Sampled], Tensor] | None = None,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Train roles "policy" and "value", which `add_roles` made.

    Args:
        prompts: token ids of each prompt that may be sampled from.
        score: what responses are worth, in place of role "reward", which then need not be there; for several
            objectives by the names of their axes, and "score" for what stands beside them. The value model predicts
            it, so around ±1 is best. Each of several processes asks for all responses and must get the same numbers.
        gold: what they are worth to a judge whom nothing climbs, in place of role "gold", where config.watch_every asks
            for it; with neither, what is watched has no gold score.
        checkpoints: where a loop that was stopped goes on from.

    Returns:
        Final metrics (means over the last tenth of the updates, `updates`, `tokens`), and the sampled responses shown.
        Where an alarm made it go back, those of the policy that it went back to, and its `kept_update`.

    Raises:
        TrainingDiverged: a quantity that was measured, a loss or a gradient is not finite.
        ConfigError: there are more processes than rollouts, config.spread_coef has no spread to weigh, or
            config.objective names an axis that the reward model does not have.
    """
    if config.spread_coef > 0 and (score is not None or len(members_of(roles, REWARD)) < 2):
        raise ConfigError(f"spread_coef {config.spread_coef:g} needs a reward model of two members or more; found one.")
    assert (VALUE in roles.bodies) == (config.value_network == "shared"), "the roles have the other value_network"
    if config.rollouts < processes.count():
        raise ConfigError(f"rollouts {config.rollouts} leave nothing to do for some of {processes.count()} processes.")
    if score is None:
        require_axes(config, list(roles.axes[REWARD]))
    torch.manual_seed(config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    policy_parameters, value_parameters = roles.trainable(POLICY), roles.trainable(VALUE)
    policy_optimiser = adamw(policy_parameters, learning_rate=config.learning_rate, weight_decay=config.weight_decay)
    value_optimiser = adamw(
        value_parameters, learning_rate=config.value_learning_rate, weight_decay=config.weight_decay
    )
    controller = (
        AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        if config.kl_controller == "adaptive"
        else FixedKL(config.kl_coef)
    )
    multiplier = multiplier_of(config)
    trained: dict[str, Sequence[Tensor]] = {"policy": policy_parameters, "value": value_parameters}
    kept = None
    if config.on_alarm == "stop":
        has_gold = gold is not None or GOLD in roles.heads
        kept = Kept([*policy_parameters, *value_parameters], gold=has_gold, window=config.watch_window)
        trained |= {"kept": kept.newest, "kept_older": kept.older}
    state = LoopState(trained, {"policy": policy_optimiser, "value": value_optimiser}, generator)
    so_far = checkpoints.restore(state)
    if so_far is None:
        so_far = {"update": 0, "tokens": 0, "kl_coef": controller.coef, "prompts_left": [], "history": [], "shown": []}
        so_far |= {"moments": vars(RunningMoments()), "alarms": []}
        if multiplier is not None:
            so_far["multiplier"] = multiplier.state()
    if kept is not None:
        kept.values = so_far.setdefault("kept", kept.values)
    controller.coef = so_far["kl_coef"]
    moments = RunningMoments(**so_far["moments"])
    if multiplier is not None:
        multiplier.restore(so_far["multiplier"])
    history, shown, prompts_left = so_far["history"], so_far["shown"], so_far["prompts_left"]
    # The table and the alarms of a run that was stopped went to another record.
    for row in shown:
        tracker.table("ppo/samples", [row], step=row["update"])
    for text in so_far["alarms"]:
        tracker.remark("ppo/alarm", text)
    alarm = None
    for update in range(so_far["update"] + 1, config.updates + 1):
        began = time.perf_counter()
        wanted = config.rollouts // config.samples_per_prompt
        chosen = [_next_prompt(prompts_left, len(prompts), generator) for _ in range(wanted)]
        sampled = sample(
            roles.language_model(POLICY),
            [prompts[row] for row in chosen for _ in range(config.samples_per_prompt)],
            max_tokens=config.response_tokens,
            temperature=config.temperature,
            stop_id=tokenizer.eos_token_id,
            pad_id=tokenizer.pad_token_id,
            generator=generator,
            keep_depth=roles.depth,
            keep_tops=True,
        )
        rollouts, metrics, scores_B = measure_rollouts(
            roles, sampled, config, kl_coef=controller.coef, score=score, moments=moments,
            multiplier=multiplier.value if multiplier is not None else 0.0,
        )  # fmt: skip
        factor = rate_factor(update - 1, steps=config.updates, warmup=config.warmup_updates, schedule=config.schedule)
        if config.watch_every and (update - 1) % config.watch_every == 0:
            size = config.micro_batch_size
            metrics |= measure_watched(roles, sampled, rollouts.trunk, micro_batch_size=size, gold=gold)
            last = max((at for at, row in enumerate(history, start=1) if row.get("ppo/alarm")), default=0)
            alarm = alarm_now([*history, metrics], config.watch_window, last=last)
            metrics["ppo/alarm"] = float(alarm is not None)
            if alarm is not None:
                so_far["alarms"].append(alarm.text())
                tracker.remark("ppo/alarm", alarm.text())
            if kept is not None:
                kept.offer([*history, metrics])
        going_back = alarm is not None and kept is not None  # it has then measured its last responses
        if config.on_alarm == "lower_rate":
            factor *= LOWERED ** sum(row.get("ppo/alarm", 0.0) for row in (*history, metrics))
        set_rate(policy_optimiser, config.learning_rate * factor)
        set_rate(value_optimiser, config.value_learning_rate * factor)
        learn_policy = update > config.value_warmup_updates
        seen: list[dict[str, float]] = []  # one a minibatch, that which stopped the update included
        steps_taken, stopped = 0, False
        for _ in range(0 if going_back else config.epochs):
            for index in _minibatches(config, generator):
                token_count = int(sampled.mask_BT[index].sum())
                minibatch = rollouts.rows(processes.places_of(index))
                step: dict[str, float] = {}
                # Answers to one prompt and rows of like length are computed together; what a minibatch holds is random.
                for micro in batches(minibatch.trunk.ids(), config.micro_batch_size):
                    part = minibatch.rows(micro)
                    part = part._replace(trunk=roles.folded(part.trunk))
                    found = losses(roles, part, config, token_count, kl_coef=controller.coef, learn_policy=learn_policy)
                    step = {name: step.get(name, 0.0) + value for name, value in found.items()}
                step = processes.add_up(step)
                seen.append(step)
                if learn_policy and step["ppo/approx_kl"] > config.early_stop_kl:
                    stopped = True
                    policy_optimiser.zero_grad(set_to_none=True)
                    value_optimiser.zero_grad(set_to_none=True)
                    break
                if learn_policy:
                    step["ppo/grad_norm"] = step_clipped(
                        policy_optimiser,
                        policy_parameters,
                        max_grad_norm=config.max_grad_norm,
                        where="ppo's policy",
                        batch=minibatch.tensors,
                    )
                step["ppo/value_grad_norm"] = step_clipped(
                    value_optimiser,
                    value_parameters,
                    max_grad_norm=config.max_grad_norm,
                    where="ppo's value model",
                    batch=minibatch.tensors,
                )
                steps_taken += 1
            if stopped:
                break
        controller.update(metrics["ppo/kl"], config.rollouts)
        if multiplier is not None and learn_policy:  # before, the policy could not answer
            multiplier.update(metrics["ppo/cost"])
            metrics["ppo/mean_cost"] = multiplier.mean
        tokens = sum(map(len, sampled.prompts)) + int(sampled.mask_BT.sum())
        so_far["tokens"] += tokens
        metrics |= {name: _mean([step[name] for step in seen if name in step]) for name in (seen[0] if seen else ())}
        metrics |= {
            "ppo/learning_rate": config.learning_rate * factor,
            "ppo/minibatches": steps_taken,
            "ppo/tokens_per_second": tokens / (time.perf_counter() - began),
        }
        history.append(metrics)
        tracker.metrics(metrics, step=update)
        rows = _rows(sampled, scores_B, tokenizer, update)
        shown += rows
        tracker.table("ppo/samples", rows, step=update)
        note = f"reward {metrics['ppo/reward']:.2f}  score {metrics['ppo/score']:.2f}  kl {metrics['ppo/kl']:.2f}"
        if multiplier is not None:
            note += f"  cost {metrics['ppo/cost']:.2f}  lambda {metrics['ppo/lambda']:.2f}"
            so_far["multiplier"] = multiplier.state()
        tracker.progress(update, config.updates, unit="updates", tokens=tokens, note=note)
        if going_back:
            break
        so_far |= {"update": update, "kl_coef": controller.coef, "moments": vars(moments)}
        checkpoints.offer(update, state, so_far, score=metrics["ppo/reward"])
    learned, watched = len(history), final_watched(history)
    if alarm is not None and kept is not None:
        back_to = kept.go_back(alarm)
        history, learned = history[:back_to], back_to - 1
        watched = {**watched, **final_watched(history), "alarms": watched["alarms"], "kept_update": back_to}
    last = history[-max(config.updates // 10, 1) :]
    final = {
        name.removeprefix("ppo/"): _mean([metrics[name] for metrics in last if name in metrics])
        for name in last[-1]
        if name not in MEASURED and not name.endswith("_per_second")
    }
    return {**final, **watched, "updates": learned, "tokens": so_far["tokens"]}, shown


@torch.no_grad()
def measure_rollouts(
    roles: Roles,
    sampled: Sampled,
    config: PPO,
    *,
    kl_coef: float,
    score: Score | None = None,
    moments: RunningMoments | None = None,
    multiplier: float = 0.0,
) -> Measured:
    """Everything about the sampled responses that stays fixed while the update learns from them.

    Args:
        score: as in `train_ppo`.
        moments: of all scores before; takes in these ones, and has to be given where config.scale_scores is set.
        multiplier: λ, the weight of the cost where one is limited.

    Raises:
        TrainingDiverged: what a model says of the responses is not finite.
    """
    ids_BT, mask_BT = sampled.ids_BT.to(roles.device), sampled.mask_BT.to(roles.device)
    size, own = len(mask_BT), processes.own(range(len(mask_BT)))
    own_ids_BT, own_mask_BT = ids_BT[own], mask_BT[own]
    responses = sampled.responses()
    packed = pack([sampled.prompts[row] for row in own], [responses[row] for row in own], 0)
    trunk = roles.trunk(packed, states=sampled.states)
    # In such pieces as learning will see: little is computed twice or is padding.
    logprobs_BT, entropy_BT, ref_logprobs_BT, values_BT, cost_values_BT = (
        torch.zeros_like(own_mask_BT, dtype=torch.float) for _ in range(5)
    )
    limited = config.objective == "constrained"
    judges = [] if score is not None else members_of(roles, REWARD)
    axes = list(roles.axes[REWARD]) if judges else []
    outputs_BMH = torch.zeros((len(own), max(len(judges), 1), 1 + len(axes)), device=roles.device)
    for rows in batches(trunk.ids(), config.micro_batch_size):
        part, length = roles.folded(trunk.rows(rows)), int(own_mask_BT[rows].sum(1).max())
        answer = (own_ids_BT[rows, :length], own_mask_BT[rows, :length])
        if sampled.tops is None:
            policy_BSD = roles.hidden(part, POLICY)
        else:  # the policy's layers have computed them already, while it sampled
            policy_BSD = _laid_back([sampled.tops[row] for row in rows], part.predicts_BS)
        both_BSD = policy_BSD if config.value_network == "shared" else None
        found, spread = roles.logprobs(
            part, POLICY, *answer, temperature=config.temperature, entropy=True, hidden_BSD=policy_BSD
        )
        assert spread is not None
        logprobs_BT[rows, :length], entropy_BT[rows, :length] = found, spread
        ref_logprobs_BT[rows, :length], _ = roles.logprobs(part, REFERENCE, *answer, temperature=config.temperature)
        if limited:
            values_BT[rows, :length], cost_values_BT[rows, :length] = roles.values_by_head(
                part, VALUE, answer[1], hidden_BSD=both_BSD
            )
        else:
            values_BT[rows, :length] = roles.values(part, VALUE, answer[1], hidden_BSD=both_BSD)
        if score is None:
            outputs_BMH[rows] = member_scores(roles, part, REWARD)
    # From here on every process has all rows, and computes the same.
    logprobs_BT, entropy_BT, ref_logprobs_BT, values_BT, cost_values_BT, outputs_BMH = (
        processes.place(part, own, size)
        for part in (logprobs_BT, entropy_BT, ref_logprobs_BT, values_BT, cost_values_BT, outputs_BMH)
    )
    if score is not None:
        axes, outputs_BMH = as_outputs(score(sampled), outputs_BMH)
        require_axes(config, axes)
    scores_B, spread_B, by_axis, cost_B = worth_of(outputs_BMH, axes, config)

    def whole() -> dict[str, Tensor]:
        return pack(sampled.prompts, responses, 0)._asdict()

    require_finite(
        {
            "A log-probability": logprobs_BT,
            "A log-probability under the reference": ref_logprobs_BT,
            "A value": values_BT,
            "A value of the cost": cost_values_BT,
        },
        where="ppo",
        batch=whole,
    )
    # The scale of these is their own.
    measured = {"A score": scores_B, **{f"A score on {axis}": found_B for axis, found_B in by_axis.items()}}
    require_finite(measured, where="ppo", batch=whole, limit=math.inf)
    if config.scale_scores:
        assert moments is not None, "a running scale needs the moments so far"
        moments.update(scores_B)
        scores_B = scores_B / moments.std
    if config.objective != "lexicographic":  # there each axis is clipped
        scores_B = scores_B.clamp(-config.score_clip, config.score_clip)
    penalty_B = config.missing_eos_penalty * (~sampled.stopped_B).to(scores_B)
    if config.length_penalty > 0:
        penalty_B = penalty_B + config.length_penalty * (mask_BT.sum(1) - config.length_free).clamp(min=0)
    penalised_B = scores_B - penalty_B
    in_reward = kl_coef if config.kl_penalty == "reward" else 0.0
    rewards_BT = shape_rewards(penalised_B, logprobs_BT, ref_logprobs_BT, mask_BT, kl_coef=in_reward)
    reward_B = rewards_BT.masked_fill(~mask_BT, 0).sum(1)  # in reward units, whatever is whitened after
    if config.whiten_rewards:
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False)
    advantages_BT, returns_BT = gae(rewards_BT, values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
    cost_returns_BT = torch.zeros_like(returns_BT)
    if cost_B is not None:
        # KL and missing ends stand in the reward and, with the opposite sign, in the cost: they weigh the same whatever
        # λ is (see constrained_advantages).
        paid_B = cost_B.clamp(-config.score_clip, config.score_clip) + penalty_B
        costs_BT = shape_rewards(paid_B, logprobs_BT, ref_logprobs_BT, mask_BT, kl_coef=-in_reward)
        cost_advantages_BT, cost_returns_BT = gae(costs_BT, cost_values_BT, mask_BT, gamma=config.gamma, lam=config.lam)
        advantages_BT = constrained_advantages(advantages_BT, cost_advantages_BT, multiplier=multiplier)
    if config.whiten_advantages:
        advantages_BT = whiten(advantages_BT, mask_BT)
    k1_BT = kl_estimate(logprobs_BT, ref_logprobs_BT, estimator="k1").masked_fill(~mask_BT, 0)
    unexplained = masked_var(returns_BT - values_BT, mask_BT) / masked_var(returns_BT, mask_BT).clamp(min=1e-8)
    metrics = {
        "ppo/reward": reward_B.mean(),
        "ppo/score": scores_B.mean(),
        "ppo/kl": k1_BT.sum(1).mean(),
        "ppo/response_length": mask_BT.sum(1).float().mean(),
        "ppo/eos_rate": sampled.stopped_B.float().mean(),
        "ppo/perplexity": torch.exp(-masked_mean(ref_logprobs_BT, mask_BT)),
        "ppo/entropy": masked_mean(entropy_BT, mask_BT),
        "ppo/explained_variance": 1 - unexplained,
    }
    if len(judges) > 1:
        metrics["ppo/score_spread"] = spread_B.mean()
    for axis, found_B in by_axis.items():
        metrics[f"ppo/axes/{axis}/score"] = found_B.mean()
    everything = [ids_BT, mask_BT, logprobs_BT, ref_logprobs_BT, values_BT, advantages_BT, returns_BT]
    if cost_B is not None:
        everything += [cost_values_BT, cost_returns_BT]
        metrics["ppo/cost"] = cost_B.mean()
    rollouts = Rollouts(trunk, *(part[own] for part in everything))
    numbers = {name: float(value) for name, value in metrics.items()}
    if limited:
        numbers["ppo/lambda"] = multiplier
    return Measured(rollouts, {**numbers, "ppo/kl_coef": kl_coef}, scores_B)


def losses(
    roles: Roles, part: Rollouts, config: PPO, token_count: int, *, kl_coef: float, learn_policy: bool = True
) -> dict[str, float]:
    """Add the gradient of a part of a minibatch, and return the part's share of the minibatch's metrics.

    Args:
        token_count: response tokens of the whole minibatch, so that every token weighs the same however it is cut.
        kl_coef: weight of the KL to the reference, where that stands in the loss.

    Raises:
        TrainingDiverged: a log-probability, a value or a loss is not finite.
    """
    share = int(part.mask_BT.sum()) / token_count
    found: dict[str, float] = {}
    both_BSD = None
    if config.value_network == "shared":
        # One pass forward and back for both, the value's gradient into the policy too; not while the policy waits.
        with torch.set_grad_enabled(learn_policy):
            both_BSD = roles.hidden(part.trunk, POLICY)
    of_policy: Tensor | float = 0.0
    if learn_policy:
        logprobs_BT, entropy_BT = roles.logprobs(
            part.trunk,
            POLICY,
            part.ids_BT,
            part.mask_BT,
            temperature=config.temperature,
            entropy=config.entropy_coef > 0,
            hidden_BSD=both_BSD,
        )
        policy = policy_loss(
            logprobs_BT,
            part.old_logprobs_BT,
            part.advantages_BT,
            part.mask_BT,
            clip_range=config.clip_range,
            dual_clip=config.dual_clip or None,
            token_count=token_count,
        )
        loss = policy.loss
        if config.kl_penalty == "loss":
            kl_BT = kl_estimate(logprobs_BT, part.ref_logprobs_BT, estimator=config.kl_estimator)  # 0 past a response
            loss = loss + kl_coef * kl_BT.sum() / token_count
            found["ppo/kl_loss"] = kl_BT.sum().item() / token_count
        if entropy_BT is not None:
            loss = loss - config.entropy_coef * entropy_BT.sum() / token_count
        require_finite({"A log-probability": logprobs_BT}, where="ppo's policy", batch=part.tensors)
        # A loss may be large where the policy has moved too far; early_stop_kl is for that.
        require_finite({"The loss": loss}, where="ppo's policy", batch=part.tensors, limit=math.inf)
        if both_BSD is None:
            loss.backward()
        else:
            of_policy = loss
        found |= {
            "ppo/policy_loss": policy.loss.item(),
            "ppo/clip_fraction": policy.clip_fraction.item() * share,
            "ppo/approx_kl": policy.approx_kl.item() * share,
            "ppo/ratio": policy.ratio_mean.item() * share,
        }
    if part.cost_returns_BT is None:
        values_BT = roles.values(part.trunk, VALUE, part.mask_BT, hidden_BSD=both_BSD)
    else:
        values_BT, cost_values_BT = roles.values_by_head(part.trunk, VALUE, part.mask_BT, hidden_BSD=both_BSD)
    value = value_loss(
        values_BT,
        part.old_values_BT,
        part.returns_BT,
        part.mask_BT,
        clip_range=config.value_clip_range,
        token_count=token_count,
    )
    require_finite({"A value": values_BT, "The loss": value.loss}, where="ppo's value model", batch=part.tensors)
    whole = value.loss
    if part.cost_returns_BT is not None:
        assert part.old_cost_values_BT is not None
        cost_value = value_loss(
            cost_values_BT,
            part.old_cost_values_BT,
            part.cost_returns_BT,
            part.mask_BT,
            clip_range=config.value_clip_range,
            token_count=token_count,
        )
        require_finite(
            {"A value": cost_values_BT, "The loss": cost_value.loss}, where="ppo's cost value", batch=part.tensors
        )
        whole = whole + cost_value.loss
        found["ppo/cost_value_loss"] = cost_value.loss.item()
    if both_BSD is not None:
        whole = of_policy + config.value_coef * whole
    whole.backward()
    return found | {
        "ppo/value_loss": value.loss.item(),
        "ppo/value_clip_fraction": value.clip_fraction.item() * share,
    }


def _minibatches(config: PPO, generator: torch.Generator) -> Sequence[Tensor]:
    """Numbers of the rollouts of each minibatch of an epoch, drawn anew; answers to one prompt share a minibatch.

    So the prompt is computed once for all of them. Where they do not fit evenly, each rollout is drawn by itself.
    """
    together = config.samples_per_prompt if config.minibatch_size % config.samples_per_prompt == 0 else 1
    first_N1 = torch.randperm(config.rollouts // together, generator=generator)[:, None] * together
    return (first_N1 + torch.arange(together)).flatten().split(config.minibatch_size)


def _next_prompt(left: list[int], count: int, generator: torch.Generator) -> int:
    """The next row number of a random order over all of them, of which `left` is what has not come; then of another."""
    if not left:
        left.extend(torch.randperm(count, generator=generator).tolist())
    return left.pop(0)


def _laid_back(tops: Sequence[Tensor], predicts_BS: Tensor) -> Tensor:
    """(B, S, D) hidden states, those from sampling where the next token is one of a response, and 0 elsewhere."""
    tops_ND = torch.cat(list(tops))
    assert len(tops_ND) == int(predicts_BS.sum()), "sampling has kept the states of other responses"
    whole_BSD = tops_ND.new_zeros((*predicts_BS.shape, tops_ND.shape[1]))
    return whole_BSD.masked_scatter(predicts_BS[..., None], tops_ND)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _rows(sampled: Sampled, scores_B: Tensor, tokenizer: PreTrainedTokenizerBase, update: int) -> list[dict[str, Any]]:
    """The first few responses of an update as text."""
    rows = []
    for row in range(min(SHOWN_SAMPLES, len(scores_B))):
        rows.append(
            {
                "update": update,
                "prompt": tokenizer.decode(sampled.prompts[row], skip_special_tokens=True),
                "response": tokenizer.decode(sampled.ids_BT[row][sampled.mask_BT[row]], skip_special_tokens=True),
                "score": round(float(scores_B[row]), 4),
                "stopped": bool(sampled.stopped_B[row]),
            }
        )
    return rows
