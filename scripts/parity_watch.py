"""Runs TRL's own trainer code on a fixed batch, and reads its tensors on the way; for scripts/parity_maths.py.

TRL's PPO sums stand in the middle of `PPOTrainer.train`. So the trainer runs on tiny random models in float64, its
sampler gives the fixed responses, and the two small functions that it calls between the sums note what they see there.
"""

import contextlib
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from rlhf_core.config import Reward
from rlhf_core.models import Roles, load_tokenizer
from rlhf_core.tiny import make_tiny

ROWS, RESPONSE_TOKENS = 16, 10
TEMPERATURE, KL_COEF, CLIP_RANGE, PENALTY = 0.7, 0.05, 0.2, 1.0
OFFSET = 1e-7  # what TRL adds to a temperature


class Watched(NamedTuple):
    """TRL's own tensors from one update, by the names that its trainer gives them."""

    rollout: dict[str, Tensor]
    pieces: list[dict[str, Tensor]]  # one a piece of a minibatch, in order
    logged: dict[str, Tensor]  # (epochs, minibatches, places) float32
    metrics: dict[str, float]  # what it reports of the update
    norms: list[float]  # of the gradient at each step that the optimiser took
    clip_calls: int


class Models(NamedTuple):
    """Ours as roles, and TRL's four with the same weights."""

    roles: Roles
    tokenizer: Any
    policy: Any
    reference: Any
    reward: Any
    value: Any


# ---- the fixed batch


def fixed_responses(stop_id: int, pad_id: int, vocabulary: int) -> Tensor:
    """(B, T) sampled ids: stops at every place but two, and after a stop what a sampler would not have cut yet."""
    generator = torch.Generator().manual_seed(0)
    ids_BT = torch.randint(3, vocabulary, (ROWS, RESPONSE_TOKENS), generator=generator)
    assert stop_id < 3
    assert pad_id < 3
    stops_at = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 5, None, None, None, None]
    for row, place in enumerate(stops_at):
        if place is not None:
            ids_BT[row, place] = stop_id
    return ids_BT[torch.randperm(ROWS, generator=generator)]


def make_models(folder: Path) -> Models:
    """A sharpened tiny model as our roles and as TRL's policy, reward and value model; and another as reference."""
    make_tiny(folder, ["Why is the sky blue? Air scatters blue light more than red.", "Name a fruit. A banana."])
    section = Reward.model_construct(lora_rank=2, lora_alpha=4, lora_layers=1, gradient_checkpointing=False)
    plain = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.mul_(10 if parameter.dim() == 2 else 1)  # a random model's tokens are else all alike
    plain.save_pretrained(folder)
    torch.manual_seed(1)
    roles = Roles(folder, section)
    roles.add("reward", head=True)
    roles.add("value", head=True)
    roles.double()
    tokenizer = load_tokenizer(folder)
    tokenizer.padding_side = "left"
    reference = LlamaForCausalLM(plain.config).double()
    with torch.no_grad():
        for mine, other in zip(reference.parameters(), plain.parameters(), strict=True):
            mine.copy_(other + 0.1 * torch.randn_like(other))
    scored = [_with_head(plain, roles.heads[role]) for role in ("reward", "value")]
    return Models(roles, tokenizer, plain.double(), reference, *scored)


def _with_head(plain: Any, head: Any) -> Any:
    config = type(plain.config).from_dict({**plain.config.to_dict(), "num_labels": 1})
    model = LlamaForSequenceClassification(config).double()
    model.model.load_state_dict(plain.model.state_dict())
    with torch.no_grad():
        model.score.weight.copy_(head.weight)
    return model


# ---- watching TRL's trainer

WHOLE = (
    "queries",
    "query_responses",
    "responses",
    "postprocessed_responses",
    "contain_eos_token",
    "logprobs",
    "ref_logprobs",
    "scores",
    "values",
    "kl",
    "rewards",
    "returns",
    "padding_mask",
    "padding_mask_p1",
)
PIECE = (
    "micro_batch_inds",
    "new_logprobs",
    "mb_logprobs",
    "mb_advantage",
    "vpred",
    "mb_values",
    "mb_return",
    "logits",
    "pg_loss",
    "vf_loss",
    "vf_clipfrac",
)


def watch_trainer(models: Models, responses_BT: Tensor, **settings: Any) -> Watched:
    """One update of TRL's PPOTrainer on the fixed responses, with what its functions were given and gave."""
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    rollout: dict[str, Tensor] = {}
    pieces: list[dict[str, Tensor]] = []
    logged: dict[str, Tensor] = {}
    gradients: dict[str, Tensor] = {}
    metrics: dict[str, float] = {}
    norms: list[float] = []
    calls = {"mean": 0, "clip": 0}
    plain_mean, plain_whiten = ppo_trainer.masked_mean, ppo_trainer.masked_whiten

    def batch_generation(model: Any, queries: Tensor, _size: int, pad_id: int, _config: Any) -> tuple[Tensor, Tensor]:
        both = torch.cat([queries, responses_BT], 1)
        logits = ppo_trainer.forward(model, both, pad_id).logits[:, queries.shape[1] - 1 : -1]
        noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2), dtype=logits.dtype)
        return both, logits / (TEMPERATURE + OFFSET) + 0.5 * noise  # so that the first ratios are not 1 already

    def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        whitened = plain_whiten(values, mask, shift_mean)
        inside = sys._getframe(1).f_locals
        kind = "advantages" if shift_mean else "rewards"
        rollout.update({f"plain_{kind}": values.clone(), f"whitened_{kind}": whitened.clone()})
        if shift_mean:
            rollout.update({name: inside[name].clone() for name in WHOLE})
        return whitened

    def masked_mean(values: Tensor, mask: Tensor, axis: Any = None) -> Tensor:
        found = plain_mean(values, mask, axis)
        frame = sys._getframe(1)
        if frame.f_code.co_name == "train":
            # The trainer calls it four times a piece: value loss, its clip fraction, policy loss, its clip fraction.
            inside, turn = frame.f_locals, calls["mean"] % 4
            calls["mean"] += 1
            if turn == 0:
                assert values is inside["vf_loss_max"]
                (gradients["grad_vpred"],) = torch.autograd.grad(found / 2, inside["vpred"], retain_graph=True)
            if turn == 2:
                assert values is inside["pg_loss_max"]
                (gradients["grad_new_logprobs"],) = torch.autograd.grad(
                    found, inside["new_logprobs"], retain_graph=True
                )
            if turn == 3:
                piece = {name: torch.as_tensor(inside[name]).detach().clone() for name in PIECE}
                pieces.append({**piece, **gradients, "pg_clipfrac": found})
                logged.update({name: inside[name] for name in ("approxkl_stats", "entropy_stats", "ratio_stats")})
        return found

    def note_step(optimiser: Any, *_: Any) -> None:
        held = [p.grad.norm() for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
        norms.append(torch.stack(held).norm().item())

    def count_clips(*_: Any, **__: Any) -> None:
        calls["clip"] += 1

    transformers.set_seed(0)  # the trainer shuffles by numpy's global generator
    copies = [copy_of(model) for model in models[2:]]
    prompts = [[5 + row, *range(20, 20 + row % 4)] for row in range(4 * ROWS)]  # more than one batch
    # TRL 1.10 and transformers 5.23 warn of each other's names.
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(action="ignore", category=FutureWarning):
        config = PPOConfig(
            folder,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=4,
            num_mini_batches=2,
            num_ppo_epochs=2,
            total_episodes=ROWS,
            response_length=RESPONSE_TOKENS,
            temperature=TEMPERATURE,
            stop_token_id=models.tokenizer.eos_token_id,
            missing_eos_penalty=PENALTY,
            kl_coef=KL_COEF,
            cliprange=CLIP_RANGE,
            cliprange_value=CLIP_RANGE,
            learning_rate=0.01,
            max_grad_norm=1.0,
            num_sample_generations=0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **settings,
        )
        policy, reference, reward, value = copies
        trainer = PPOTrainer(
            config, models.tokenizer, policy, reference, reward, Dataset.from_dict({"input_ids": prompts}), value
        )
        trainer.optimizer.optimizer.register_step_pre_hook(note_step)
        trainer.accelerator.clip_grad_norm_ = count_clips
        trainer.log = metrics.update
        watchers = {"batch_generation": batch_generation, "masked_whiten": masked_whiten, "masked_mean": masked_mean}
        with _replaced(ppo_trainer, watchers), _replaced(nn.utils, {"clip_grad_norm_": count_clips}):
            trainer.train()
    return Watched(rollout, pieces, logged, metrics, norms, calls["clip"])


@contextlib.contextmanager
def _replaced(module: Any, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    kept = {name: getattr(module, name) for name in functions}
    for name, function in functions.items():
        setattr(module, name, function)
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(module, name, function)


def copy_of(model: Any) -> Any:
    """Another model in float64 with the same weights."""
    fresh = type(model)(model.config).double()
    fresh.load_state_dict(model.state_dict())
    return fresh


# ---- a trainer's method on given numbers


class Says(nn.Module):
    """A model that answers with these logits."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_: Any) -> Any:
        return SimpleNamespace(logits=self.logits.clone())


def stand_in(**attributes: Any) -> Any:
    """What a trainer's method asks of its trainer, so that the method runs on given numbers."""
    settings = {name: attributes.pop(name) for name in ("center_rewards_coefficient",) if name in attributes}
    accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    return SimpleNamespace(
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, **settings),
        accelerator=accelerator,
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        _total_train_tokens=0,
        _metrics={"train": defaultdict(list)},
        **attributes,
    )
