"""The chain of any cut equals the whole model: outputs, gradients, and every slice of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from ecogen.config import Tunables as Spec
from ecogen.models.tunables import named_tunables, set_tunables
from ecogen.runtime.chain import Chain
from tests.tiny import tiny_vit
from tests.tuning.clusters import KINDS, Case, cases, cut_model, plain_model, random_batches, random_tunables


def chain_of(case: Case) -> Chain:
    whole = tiny_vit(case.config)
    models = {n: cut_model(whole, case.placement.segments_of(n), case.spec) for n in case.placement.node_ids}
    for model in models.values():
        set_tunables(model, random_tunables(case))
    return Chain(case.placement, models)


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_with_every_kind_of_tunables_it_does(spec: Spec) -> None:
    assert_equal(Case(3, (1, 2), spec=spec), batch_size=2)


@given(case=cases(), batch_size=st.integers(1, 4))
@settings(max_examples=20)
def test_a_chain_equals_the_whole_model_in_outputs_and_gradients(case: Case, batch_size: int) -> None:
    assert_equal(case, batch_size)


def assert_equal(case: Case, batch_size: int) -> None:
    (batch,) = random_batches(1, batch_size, dtype=torch.float64)  # in which rounding hides and fakes nothing
    chain, plain = chain_of(case).double(), plain_model(case, double=True)
    logits, truth = chain(batch.images), plain.logits(batch.images)
    torch.testing.assert_close(logits, truth, rtol=1e-10, atol=1e-10)

    cross_entropy(logits, batch.labels).backward()
    cross_entropy(truth, batch.labels).backward()
    grads = {name: p.grad for model in chain.held for name, p in named_tunables(model)}
    assert grads.keys() == plain.tunables.keys()
    for name, grad in grads.items():
        torch.testing.assert_close(grad, plain.tunables[name].grad, rtol=1e-8, atol=1e-10, msg=name)


def test_with_all_tokens_and_no_tunables_the_outputs_are_those_of_transformers_bit_for_bit() -> None:
    case = Case(4, (1, 3))
    whole = tiny_vit(case.config)
    models = {n: cut_model(whole, case.placement.segments_of(n), case.spec) for n in case.placement.node_ids}
    for model in models.values():
        model.gives_all_tokens = True
        for block in model.whole.vit.layers:
            block._forward_hooks.clear(), block._forward_pre_hooks.clear()
    (batch,) = random_batches(1, 3)
    assert torch.equal(Chain(case.placement, models)(batch.images), whole(batch.images).logits)


@given(case=cases(), data=st.data())
@settings(max_examples=8)
def test_a_chain_may_be_run_slice_by_slice(case: Case, data: st.DataObject) -> None:
    chain = chain_of(case)
    middle = data.draw(st.integers(0, len(chain)))
    (batch,) = random_batches(1, 2)
    assert torch.equal(chain[middle:](chain[:middle](batch.images)), chain(batch.images))
    assert [visit.node_id for visit in chain] == [visit.node_id for visit in case.placement]


def test_a_node_that_lacks_a_block_cannot_run_it() -> None:
    case = Case(3, (1,))
    model = cut_model(tiny_vit(case.config), case.placement.segments_of("device-1"), case.spec)
    with pytest.raises(RuntimeError, match="another node"):
        model.whole.vit.layers[0](torch.zeros(1, 5, 16))
