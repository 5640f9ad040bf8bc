"""Text as people have it: files of text, JSONL and Parquet, folders of these, and data sets of the hub.

A text file is one document. A line of JSONL and a row of Parquet have one of

    text                     a document
    prompt, completion       what is asked and what is to be learnt, both strings
    messages                 a conversation: each message has a `role` and a `content`
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ecogen.errors import DataError

TEXT_FILES, JSONL, PARQUET = (".txt", ".md", ".rst", ".py"), (".jsonl", ".ndjson"), (".parquet",)

_FORMS = "a row has 'text', or 'prompt' and 'completion', or 'messages' with 'role' and 'content'"


@dataclass(frozen=True, slots=True)
class Message:
    """What somebody said in a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Document:
    """A text; or what is asked and what is to be learnt; or a conversation, of which the assistant's part is.

    Attributes:
        text: where there is a prompt, the completion.
        prompt: None where all of the text is to be learnt.
        messages: of a conversation; it has nothing else.
    """

    text: str = ""
    prompt: str | None = None
    messages: tuple[Message, ...] = ()

    @property
    def is_instruction(self) -> bool:
        """Whether only a part of it is to be learnt."""
        return self.prompt is not None or bool(self.messages)


def read_documents(source: str) -> list[Document]:
    """The documents of a file, of all files below a folder in the order of their names, or of the hub's data set.

    Raises:
        DataError: if there are none, or one cannot be read.
    """
    if source.startswith("hf:"):
        from ecogen.tuning.hub_data import read_hub_rows

        return [as_document(row, source) for row in read_hub_rows(source.removeprefix("hf:"))]
    path = Path(source).expanduser()
    documents = [document for file in _files(path) for document in _read(file)]
    if not documents:
        raise DataError(f"{path} holds no text; give files of {', '.join((*TEXT_FILES, *JSONL, *PARQUET))}")
    return documents


def as_document(row: Mapping[str, Any], place: str) -> Document:
    """A row as a document.

    Raises:
        DataError: if it has none of the forms.
    """
    match row:
        case {"messages": [_, *_] as messages}:
            return Document(messages=tuple(_message(message, place) for message in messages))
        case {"prompt": str(prompt), "completion": str(completion)}:
            return Document(completion, prompt)
        case {"text": str(text)}:
            return Document(text)
    raise DataError(f"{place}: {_FORMS}, but this has {', '.join(map(repr, row)) or 'nothing'}")


def _message(message: object, place: str) -> Message:
    match message:
        case {"role": str(role), "content": str(content)}:
            return Message(role, content)
    raise DataError(f"{place}: each message is an object with strings 'role' and 'content', not {message!r:.80}")


def _files(path: Path) -> Sequence[Path]:
    """A file itself, or those below a folder that may hold documents."""
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise DataError(f"there is no {path}; give a file or a folder of text as data.path")
    known = (*TEXT_FILES, *JSONL, *PARQUET)
    return sorted(file for file in path.rglob("*") if file.suffix in known and file.is_file())


def _read(file: Path) -> Iterable[Document]:
    if file.suffix in JSONL:
        return [as_document(row, place) for place, row in _lines(file)]
    if file.suffix in PARQUET:
        from ecogen.tuning.parquet import read_rows

        return [as_document(row, f"{file}, row {number}") for number, row in enumerate(read_rows(file))]
    return [Document(_text_of(file))]


def _lines(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each object of a JSONL file with its place."""
    for number, line in enumerate(_text_of(file).splitlines(), start=1):
        place = f"{file}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise DataError(f"{place} is no JSON ({problem}); {_FORMS}") from problem
        if not isinstance(row, dict):
            raise DataError(f"{place} is no object but {row!r:.40}; {_FORMS}")
        yield place, row


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise DataError(f"cannot read {file} as UTF-8 text ({problem}); convert it, or leave it out") from problem
