"""The tokenizer beside a text model's weights, as `save_pretrained` writes it."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ecogen.errors import CheckpointError


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a model's folder.

    Raises:
        CheckpointError: if there is none, or it is of a kind that cannot say which characters a token stands for.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as problem:  # whatever its classes ran into
        text = " ".join(str(problem).split())
        raise CheckpointError(f"{folder} has no tokenizer ({text}); save it there with save_pretrained") from problem
    if not tokenizer.is_fast:
        raise CheckpointError(f"{folder} has a slow tokenizer; save a fast one there, with a tokenizer.json")
    return tokenizer
