"""The seam between an API server and whatever serves a model: a request for tokens, its tokens, what it took."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Protocol

from ecogen.accounting.bill import Bill
from ecogen.serving.sampling import Chosen, Sampling


@dataclass(frozen=True)
class Wording:
    """A question as it was put, where the answer to one that means the same will do.

    Attributes:
        text: of the question.
        context: a digest of all that went before it.
    """

    text: str
    context: str


@dataclass(frozen=True)
class Taken:
    """An answer was not computed: it is that of an earlier question, which means the same as far as that can be told.

    Attributes:
        similarity: of the two, 0 to 1.
        question: the earlier one.
    """

    similarity: float
    question: str


@dataclass(frozen=True)
class GenerationRequest:
    """One answer that is wanted.

    Attributes:
        model: the name of a served model: the backbone's, or an adapter's.
        prompt: token ids.
        max_new: tokens of the answer at most.
        ends: token ids after which it is over; the ending one is given too.
        tenant: whose request it is, where there are tenants; an adapter of another's is not there for it.
        wording: of the prompt, for those who do not insist on an answer to just that.
        is_probe: nobody asked; a gateway wants to see whether the model answers. Not counted as a request.
        is_whole: nobody reads the answer before it is over, as of a picture: its tokens may come all at once, in one
            message. If the edge is lost before that, the answer begins anew.
    """

    model: str
    prompt: tuple[int, ...]
    sampling: Sampling
    max_new: int
    ends: frozenset[int] = frozenset()
    tenant: str | None = None
    wording: Wording | None = None
    is_probe: bool = False
    is_whole: bool = False


@dataclass(frozen=True)
class Finish:
    """What one answer took.

    Attributes:
        bill: energy and emissions, modelled, with bounds.
        t_ul_s: until the prompt is where it is computed.
        t_inference_s: from there to the last token, hops between stages included.
        t_dl_s: until the last token is back.
        node_ids: where it was computed, in order.
        num_reused: tokens of the prompt that had been computed for another request.
        taken: of which question the answer is, where it is another's.
    """

    bill: Bill
    t_ul_s: float
    t_inference_s: float
    t_dl_s: float
    node_ids: tuple[str, ...]
    num_reused: int = 0
    taken: Taken | None = None


@dataclass(frozen=True)
class ServedModel:
    """A model that can be asked for by name.

    Attributes:
        created_s: when it came, in seconds since 1970.
        backbone: of an adapter, the name of what it is an adapter of.
        max_tokens: the longest request, prompt and answer.
        tenant: whose alone it is; None for all.
        nbytes: of its weights, as they cross a link once.
    """

    name: str
    created_s: float
    max_tokens: int
    backbone: str | None = None
    tenant: str | None = None
    nbytes: int = 0


class Serving(Protocol):
    """Serves models. Not thread-safe: one event loop."""

    def models(self, tenant: str | None = None) -> Sequence[ServedModel]:
        """Those that a tenant may ask for, the backbone first."""

    def generate(self, request: GenerationRequest) -> AsyncGenerator[Chosen | Finish, bool | None]:
        """The answer's tokens as they come, and what it took in the end. Leaving early frees the slot.

        Who has enough before the end, since the text holds a stop string, sends True instead of asking for the next
        token, and gets what it took so far: `if (yield chosen): break`.

        Raises:
            UnknownModelError: if the tenant has no such model.
            ServingError: if the request does not fit, cannot be carried out or is broken off.
            OverloadedError: if as many requests wait as may.
        """
