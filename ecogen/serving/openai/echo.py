"""A model that says what it was told, at once: for tests, and to measure what the API server itself costs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from itertools import islice

from ecogen.accounting.bill import Bill
from ecogen.errors import UnknownModelError
from ecogen.serving.generation import Finish, GenerationRequest, ServedModel
from ecogen.serving.sampling import Chosen


class EchoServing:
    """Serves one model, whose answer is the prompt and then an ending token.

    Args:
        max_tokens: the longest request, prompt and answer.
    """

    def __init__(self, name: str = "echo", *, max_tokens: int = 4096) -> None:
        self._model = ServedModel(name, created_s=0.0, max_tokens=max_tokens)

    def models(self, tenant: str | None = None) -> Sequence[ServedModel]:
        return [self._model]

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Chosen | Finish, bool | None]:
        """The prompt's tokens, all of them certain."""
        if request.model != self._model.name:
            raise UnknownModelError(f"there is no model {request.model!r}; ask for {self._model.name!r}")
        for token in islice((*request.prompt, *sorted(request.ends)[:1]), request.max_new):
            top = ((token, 0.0),) if request.sampling.num_top else ()
            if (yield Chosen(token, 0.0, top)) or token in request.ends:
                break
        yield Finish(Bill.zero(), 0.0, 0.0, 0.0, ("echo",))
