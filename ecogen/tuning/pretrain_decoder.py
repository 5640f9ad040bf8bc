"""Pre-training in the cloud: a small Llama learns to tell the next token of a corpus, in a minute or two of CPU time.

Matrices of the blocks learn by Muon, all else by AdamW. Of text, batches are windows that begin anywhere in the corpus.

Shapes: B passages a batch, T tokens of a passage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from ecogen.config import Model
from ecogen.tuning.muon import Muon
from ecogen.tuning.parallel import THREADS, Workers
from ecogen.tuning.passages import Passages
from ecogen.tuning.pretrain import schedule

TEXT_VERSION = 2
"""Raise it with any change that makes the same arguments give another model: caches are keyed by it."""

OnStep = Callable[[str, int, int, float], None]
Batches = Callable[[int, torch.Generator], Passages]
"""So many random passages."""

_CLIP_NORM = 1.0
_MARKS = ("bos_token_id", "eos_token_id", "pad_token_id")
_POSITIONS_A_TOKEN = 8  # more than it is trained on, for those who want to try


def llama_config(model: Model, tokenizer: PreTrainedTokenizerBase | None = None) -> LlamaConfig:
    """The configuration of the text model that a recipe has made."""
    marks = {} if tokenizer is None else {name: getattr(tokenizer, name) for name in _MARKS}
    return LlamaConfig(
        vocab_size=model.vocabulary_size,
        hidden_size=model.hidden_size,
        num_hidden_layers=model.num_blocks,
        num_attention_heads=model.num_heads,
        num_key_value_heads=model.num_heads,
        intermediate_size=model.intermediate_size,
        max_position_embeddings=_POSITIONS_A_TOKEN * model.context_length,
        tie_word_embeddings=True,
        **marks,
    )


def new_llama(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """An untrained model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()


def pretrain_decoder(
    config: LlamaConfig,
    batches: Batches,
    *,
    seed: int,
    on_step: OnStep,
    steps: int,
    batch_size: int,
    matrix_rate: float,
    learning_rate: float,
    weight_decay: float,
) -> LlamaForCausalLM:
    """A small Llama that was shown a corpus; the same for the same arguments.

    Args:
        batches: so many passages, as a function of the generator.
        on_step: called after each step with phase, step, steps and loss.
        matrix_rate, learning_rate: peaks of Muon and of AdamW.
    """
    generator, model = torch.Generator().manual_seed(seed), new_llama(config, seed)
    optimizers = _optimizers(model, matrix_rate, learning_rate, weight_decay)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    with Workers() as workers:
        for step in range(steps):
            for optimizer, peak in zip(optimizers, peaks, strict=True):
                optimizer.param_groups[0]["lr"] = peak * schedule((step + 1) / steps)
            loss = _descend(workers, model, batches(batch_size, generator), optimizers)
            on_step("next token", step + 1, steps, loss)
    return model


def windows(stream: Tensor, length: int) -> Batches:
    """Passages of T tokens that begin anywhere in a corpus, which is one row of tokens."""

    def drawn(count: int, generator: torch.Generator) -> Passages:
        starts = torch.randint(max(1, len(stream) - length), (count, 1), generator=generator)
        tokens = stream[(starts + torch.arange(min(length + 1, len(stream)))).clamp(max=len(stream) - 1)]
        return Passages(tokens[:, :-1], tokens[:, 1:])

    return drawn


def _optimizers(
    model: LlamaForCausalLM, matrix_rate: float, learning_rate: float, weight_decay: float
) -> list[Optimizer]:
    """Muon for the blocks' matrices, one for each thread, AdamW for the embedding and norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(matrix) for matrix in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        *(Muon(matrices[start::THREADS], lr=matrix_rate, weight_decay=weight_decay) for start in range(THREADS)),
        AdamW(others, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98)),
    ]


def _descend(workers: Workers, model: LlamaForCausalLM, batch: Passages, optimizers: Sequence[Optimizer]) -> float:
    """A step; gives the loss before it."""
    loss = workers.backward(model, batch)
    torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
    workers.step(optimizers)
    return loss
