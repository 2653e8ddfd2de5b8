"""Small random models that end their turns now and then, and what training would do to them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_core.models import Roles
from rlhf_core.tiny import make_llama


def write_llama(folder: Path, tokenizer: PreTrainedTokenizerFast, *, ends: float = 0.12, **changes: Any) -> Path:
    sizes = {"num_hidden_layers": 3, "max_position_embeddings": 256, "initializer_range": 0.2}
    return write_model(make_llama(tokenizer, tie_word_embeddings=False, **sizes, **changes), tokenizer, folder, ends)


def write_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path, ends: float = 0.12) -> Path:
    _end_turns(model, tokenizer.eos_token_id, share=ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def _end_turns(model: PreTrainedModel, eos: int, *, share: float) -> None:
    """Let the end of turn be `share` of all next tokens, where a random head would give it 1 in 300."""
    model.eval()
    ids = torch.randint(3, 300, (32, 8), generator=torch.Generator().manual_seed(1))
    hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
    head = model.get_output_embeddings().weight
    head.mul_(2.0)  # and let there be likely and unlikely tokens
    direction = hidden.mean(0) / hidden.mean(0).norm()
    low, high = 0.0, 10.0
    for _ in range(20):
        head[eos] = direction * (low + high) / 2
        found = (hidden @ head.T).softmax(1)[:, eos].mean().item()
        low, high = (low, (low + high) / 2) if found > share else ((low + high) / 2, high)


def perturb(roles: Roles, role: str, *, seed: int = 0) -> None:
    """What training does to a role's parameters, in one go."""
    generator = torch.Generator().manual_seed(seed)
    size = 0.02 if role in roles.full else 0.1
    with torch.no_grad():
        for parameter in roles.trainable(role):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def perturbed(folder: Path, config: Any, **options: Any) -> Roles:
    """A model with a reward model that training has moved."""
    torch.manual_seed(0)  # of the fresh head
    roles = Roles(folder, config)
    roles.add("reward", head=True, **options)
    perturb(roles, "reward")
    return roles


def passes_of(patch: pytest.MonkeyPatch) -> list[str]:
    """The roles that pass through their layers from now on, as they do."""
    passes: list[str] = []
    hidden = Roles.hidden

    def counted(self: Roles, trunk: Any, role: str) -> Tensor:
        passes.append(role)
        return hidden(self, trunk, role)

    patch.setattr(Roles, "hidden", counted)
    return passes
