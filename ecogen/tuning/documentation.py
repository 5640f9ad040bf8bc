"""The text that comes with every CPython: the topics of its documentation, `pydoc_data.topics`.

Many topics repeat paragraphs of others, as 'if' does of 'compound': each paragraph stays with the largest topic that
has it, so that nobody is tested on what somebody else learnt. In the order of their sizes, every other topic is the
cloud's, which pre-trains on it, and the rest are dealt to the edges.
"""

from __future__ import annotations

import pydoc_data.topics
from collections.abc import Sequence
from functools import lru_cache


def cloud_topics() -> list[str]:
    """What the cloud pre-trains on."""
    return list(_topics()[1::2])


def topics_of_edges(edge_ids: Sequence[str]) -> dict[str, list[str]]:
    """Each edge's own topics."""
    own = _topics()[::2]
    return {edge_id: list(own[index :: len(edge_ids)]) for index, edge_id in enumerate(edge_ids)}


@lru_cache(maxsize=1)
def _topics() -> tuple[str, ...]:
    """The topics with what only they have, the largest first."""
    seen: set[str] = set()
    topics = []
    for text in sorted(pydoc_data.topics.topics.values(), key=_largest_first):
        paragraphs = [part for part in text.split("\n\n") if part.strip() and part not in seen]
        seen.update(paragraphs)
        topics.append("\n\n".join(paragraphs))
    return tuple(sorted(filter(None, topics), key=_largest_first))


def _largest_first(text: str) -> tuple[int, str]:
    return -len(text), text
