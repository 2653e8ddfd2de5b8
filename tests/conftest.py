"""What the tests share: small random models that stop now and then, their tokenizer, and small configurations.

Nothing here is downloaded, and nothing is read from params.yaml: a test's numbers stand in the test.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small import write_llama, write_model
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from rlhf_core.config import DPO, PPO, SFT, Evaluate, Judge, Prepare, Reward
from rlhf_core.tiny import make_tokenizer

PROJECT = Path(__file__).resolve().parents[1]
TEXTS = [
    "Why is the sky blue? Because air scatters blue light more than red.",
    "Please write a short note to my neighbour about the cat. Dear neighbour, the cat is well.",
    "How many legs has a spider? A spider has eight legs.",
    "Name a fruit that is yellow. A banana is yellow, and so is a lemon.",
]
LORA = {
    "seed": 0,
    "method": "lora",
    "lora_rank": 4,
    "lora_alpha": 8,
    "lora_layers": 1,
    "micro_batch_size": 4,
    "learning_rate": 1e-2,
    "schedule": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "gradient_checkpointing": False,
}
SECTIONS: dict[str, tuple[type, dict[str, Any]]] = {
    "prepare": (
        Prepare,
        {
            "base": "path:base",
            "demonstrations": [],
            "rankings": [],
            "prompts": [],
            "system": "",
            "max_prompts": 0,
            "on_bad_row": "stop",
            "max_prompt_tokens": 64,
            "max_response_tokens": 32,
            "validation_fraction": 0.2,
            "test_fraction": 0.2,
            "gold_fraction": 0.2,
        },
    ),
    "sft": (
        SFT,
        {**LORA, "epochs": 1, "batch_size": 4, "warmup_fraction": 0.0, "keep": "best", "feedback": "", "weights": {}},
    ),
    "reward": (
        Reward,
        {
            **LORA,
            "epochs": 1,
            "batch_size": 4,
            "warmup_fraction": 0.0,
            "loss": "pairs",
            "label_smoothing": 0.0,
            "margin_coef": 0.0,
            "center_coef": 0.0,
            "length": "ignore",
            "norm_samples": 8,
            "axes": [],
            "members": 1,
            "start": "",
            "feedback": "",
            "weights": {},
        },
    ),
    "ppo": (
        PPO,
        {
            **LORA,
            "reward": "reward",
            "updates": 1,
            "rollouts": 8,
            "samples_per_prompt": 1,
            "response_tokens": 6,
            "temperature": 1.0,
            "epochs": 1,
            "minibatch_size": 8,
            "value_learning_rate": 1e-2,
            "value_network": "own",
            "value_coef": 0.1,
            "warmup_updates": 0,
            "value_warmup_updates": 0,
            "kl_controller": "fixed",
            "kl_coef": 0.0,
            "kl_penalty": "reward",
            "kl_estimator": "k1",
            "kl_target": 6.0,
            "kl_horizon": 1000,
            "clip_range": 0.2,
            "dual_clip": 0.0,
            "entropy_coef": 0.0,
            "value_clip_range": 0.2,
            "gamma": 1.0,
            "lam": 1.0,
            "whiten_advantages": True,
            "whiten_rewards": False,
            "scale_scores": False,
            "score_clip": 100.0,
            "spread_coef": 0.0,
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
            "missing_eos_penalty": 0.0,
            "early_stop_kl": 100.0,
            "start": "",
            "length_penalty": 0.0,
            "length_free": 0,
            "watch_every": 0,
            "watch_window": 8,
            "on_alarm": "log",
        },
    ),
    "dpo": (
        DPO,
        {**LORA, "epochs": 1, "batch_size": 4, "warmup_fraction": 0.0, "beta": 0.1, "label_smoothing": 0.0},
    ),
    "evaluate": (
        Evaluate,
        {
            "seed": 0,
            "samples_per_prompt": 2,
            "temperature": 0.7,
            "response_tokens": 6,
            "bootstrap_samples": 100,
            "report_prompts": 2,
            "best_of_n": (),
        },
    ),
    "judge": (
        Judge,
        {
            "kind": "endpoint",
            "model": "tiny-judge",
            "url": "http://127.0.0.1:9/v1",
            "axes": [],
            "seed": 0,
            "bar": 0.55,
            "check_pairs": 100,
            "temperature": 0.0,
            "answer_tokens": 100,
            "concurrency": 1,
            "requests_per_minute": 0,
            "timeout": 10.0,
            "retries": 2,
            "prompt_price": 1.0,
            "answer_price": 2.0,
            "max_cost": 100.0,
        },
    ),
}


def pytest_configure(config: pytest.Config) -> None:
    """Take over the one filter that rlhf_core.models sets: pytest puts its own "error" before it."""
    config.addinivalue_line("filterwarnings", "ignore:.*is_gradient_checkpointing.*:FutureWarning")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """On models this small more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def section() -> Callable[..., Any]:
    """A section of the configuration: section("ppo", updates=3) is the small one above with that change."""

    def build(name: str, **changes: Any) -> Any:
        kind, values = SECTIONS[name]
        return kind.model_validate({**values, **changes})

    return build


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(TEXTS, vocabulary=300)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A Llama of three layers and 32 dimensions that ends its turn at about one token in ten."""
    return write_llama(tmp_path_factory.mktemp("llama") / "base", tokenizer)


@pytest.fixture(scope="session")
def llama_with_dropout(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """The same with dropout in its configuration, as models come that were trained with it."""
    return write_llama(tmp_path_factory.mktemp("dropout") / "base", tokenizer, attention_dropout=0.5)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> Path:
    """A GPT-2 of two layers, whose body cannot be cut; dropout is in its default configuration."""
    folder = tmp_path_factory.mktemp("gpt2") / "base"
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.2,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return write_model(GPT2LMHeadModel(config), tokenizer, folder)
