"""Two threads give a batch's gradients: those of the whole batch, and the same model on any number of cores."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

from ecogen.tuning.parallel import Workers
from ecogen.tuning.passages import IGNORED, Passages
from ecogen.tuning.pretrain_decoder import new_llama, pretrain_decoder, windows

_CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    intermediate_size=32,
    tie_word_embeddings=True,
)


def _passages(num: int) -> Passages:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(64, (num, 9), generator=generator)
    labels = tokens[:, 1:].clone()
    labels[: num // 2, 3:] = IGNORED  # the halves count unequally
    return Passages(tokens[:, :-1], labels)


def _whole(model: LlamaForCausalLM, passages: Passages) -> tuple[float, list[Tensor]]:
    logits = model(input_ids=passages.tokens, use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1), passages.labels.flatten(), ignore_index=IGNORED)
    return loss.item(), list(torch.autograd.grad(loss, list(model.parameters())))


@pytest.mark.parametrize("num", [1, 2, 7])
def test_halves_give_the_gradients_of_the_whole_batch(num: int) -> None:
    model, passages = new_llama(_CONFIG, 0), _passages(num)
    loss, gradients = _whole(model, passages)
    with Workers() as workers:
        given = workers.backward(model, passages)
    assert given == pytest.approx(loss, rel=1e-5)
    for parameter, wanted in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-6)


def test_the_model_is_the_same_on_any_number_of_cores(one_thread: None) -> None:
    """Tensors are of a size at which PyTorch would use more threads."""
    large = LlamaConfig(**{**_CONFIG.to_dict(), "vocab_size": 900, "hidden_size": 192, "head_dim": 96})

    def trained(threads: int) -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        return _trained(config=large).state_dict()

    one, four = trained(1), trained(4)
    assert all(torch.equal(one[name], four[name]) for name in one)


def test_it_learns(one_thread: None) -> None:
    losses = list[float]()
    _trained(lambda _phase, _step, _steps, loss: losses.append(loss), steps=60)
    assert losses[-1] < 0.5 * losses[0]


def test_a_failure_is_told_and_no_thread_is_left() -> None:
    before = threading.active_count()
    with pytest.raises(IndexError), Workers() as workers:
        workers.backward(new_llama(_CONFIG, 0), Passages(torch.full((4, 3), 64), torch.zeros(4, 3, dtype=torch.long)))
    assert threading.active_count() == before


def test_other_threads_compute_afterwards_as_before(one_thread: None) -> None:
    torch.set_num_threads(3)
    with Workers() as workers:
        workers.backward(new_llama(_CONFIG, 0), _passages(4))
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(torch.get_num_threads).result() == 3


def _trained(on_step: object = lambda *_: None, steps: int = 4, config: LlamaConfig = _CONFIG) -> LlamaForCausalLM:
    stream = torch.arange(256) % 16
    return pretrain_decoder(
        config,
        windows(stream, 12),
        seed=0,
        on_step=on_step,  # type: ignore[arg-type]
        steps=steps,
        batch_size=8,
        matrix_rate=0.02,
        learning_rate=1e-2,
        weight_decay=0.1,
    )
