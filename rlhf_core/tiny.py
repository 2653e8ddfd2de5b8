"""A random two-layer model with a tokenizer trained on the starter prompts: for tests and for a first look.

python -m rlhf_core.tiny FOLDER
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT = Path("data/starter/demonstrations.jsonl")
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(texts: list[str], *, vocabulary: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer in ChatML, whose PAD is not its EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=START, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_llama(tokenizer: PreTrainedTokenizerBase, *, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of two layers and 32 dimensions for a tokenizer, or as `changes` to its configuration say."""
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


def make_tiny(folder: str | Path, texts: list[str], *, seed: int = 0) -> None:
    """Write a model of about 60,000 weights, and its tokenizer."""
    tokenizer = make_tokenizer(texts)
    make_llama(tokenizer, seed=seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    rows = [json.loads(line) for line in TEXT.read_text(encoding="utf-8").splitlines()]
    make_tiny(sys.argv[1], [text for row in rows for text in (row["prompt"], row["response"])])
