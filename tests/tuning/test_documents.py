"""Text as people have it is read whole, and what is wrong with it is told with its place."""

from __future__ import annotations

import json
import sys
from itertools import combinations
from pathlib import Path

import pytest

from ecogen.config import Data, Partition
from ecogen.errors import DataError
from ecogen.tuning.documentation import cloud_topics, topics_of_edges
from ecogen.tuning.documents import Document, Message, as_document, read_documents
from ecogen.tuning.text import check_text, is_here, read_text
from ecogen.tuning.vocabulary import train_tokenizer

ROWS = [
    {"text": "a text"},
    {"prompt": "who?", "completion": "me"},
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
]
DOCUMENTS = [
    Document("a text"),
    Document("me", "who?"),
    Document(messages=(Message("user", "hi"), Message("assistant", "ho"))),
]
EDGES = ["edge-0", "edge-1"]


def test_every_form_of_a_row_is_read_from_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    assert read_documents(str(path)) == DOCUMENTS
    assert [document.is_instruction for document in DOCUMENTS] == [False, True, True]


def test_every_form_of_a_row_is_read_from_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist([row | {"other": 1} for row in ROWS]), tmp_path / "rows.parquet")
    names = {"text", "prompt", "completion", "messages"}
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert set(table.column_names) <= names | {"other"}
    for row, document in zip(ROWS, DOCUMENTS, strict=True):
        parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "rows.parquet")
        assert read_documents(str(tmp_path / "rows.parquet")) == [document]


def test_a_folder_is_all_its_files_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("third")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / "b" / "a.jsonl").write_text(json.dumps({"text": "second"}))
    (tmp_path / "picture.png").write_bytes(b"\x89")
    assert [document.text for document in read_documents(str(tmp_path))] == ["first", "second", "third"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", r"rows.jsonl:1 is no JSON"),
        ("[1]", r"rows.jsonl:1 is no object but \[1\]"),
        ('{"txt": "x"}', r"rows.jsonl:1: a row has 'text', or .* but this has 'txt'"),
        ('{"text": 3}', r"but this has 'text'"),
        ('{"messages": [{"role": "user"}]}', r"each message is an object with strings 'role' and 'content'"),
        ("", r"rows.jsonl holds no text; give files of \.txt"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(tmp_path: Path, content: str, said: str) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "fine"}\n'[:0] + content)
    with pytest.raises(DataError, match=said):
        read_documents(str(tmp_path / "rows.jsonl"))


def test_what_is_not_there_or_not_text(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no .*nowhere; give a file or a folder"):
        read_documents(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="holds no text"):
        read_documents(str(tmp_path))
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match=r"cannot read .*x.txt as UTF-8"):
        read_documents(str(tmp_path))
    (tmp_path / "x.txt").unlink()
    (tmp_path / "x.parquet").write_bytes(b"no")
    pytest.importorskip("pyarrow")
    with pytest.raises(DataError, match=r"x.parquet is no Parquet file"):
        read_documents(str(tmp_path))


def test_what_needs_a_library_that_is_missing_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x.parquet").write_bytes(b"no")
    for name in ("pyarrow", "datasets"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(DataError, match=r"needs pyarrow; install it: pip install 'ecogen\[data\]'"):
        read_documents(str(tmp_path / "x.parquet"))
    with pytest.raises(DataError, match=r"'hf:a/b' needs the library datasets.*give their folder as data.path"):
        read_documents("hf:a/b")


def test_a_hub_that_cannot_be_reached_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Datasets:
        @staticmethod
        def load_dataset(name: str, split: str) -> None:
            raise ConnectionError(f"no route to {name}")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    with pytest.raises(DataError, match=r"cannot get the data set 'a/b' from the hub \(ConnectionError: no route"):
        read_documents("hf:a/b")


def test_a_row_of_messages_wins_over_other_columns() -> None:
    assert as_document({"messages": ROWS[2]["messages"], "id": 3}, "here") == DOCUMENTS[2]


# Python's documentation.


def test_no_paragraph_is_at_two_places() -> None:
    places = [cloud_topics(), *topics_of_edges(EDGES).values()]
    paragraphs = [{part for text in texts for part in text.split("\n\n")} for texts in places]
    assert all(not one & other for one, other in combinations(paragraphs, 2))
    assert all(sum(map(len, texts)) > 50_000 for texts in places)


# Splits.


def documentation(**values: object) -> Data:
    return Data(
        name="documentation",
        train=30,
        validation=5,
        test=7,
        partition=Partition(across_edges=values.pop("across", "domain")),
        **values,
    )


@pytest.mark.parametrize("across", ["domain", "iid"])
def test_splits_are_disjoint_and_the_same_for_everybody(across: str) -> None:
    tokenizer = train_tokenizer(cloud_topics(), 300)
    splits = [read_text(documentation(across=across), EDGES, edge, tokenizer, 64, 3) for edge in EDGES]
    again = read_text(documentation(across=across), EDGES, "edge-1", tokenizer, 64, 3)
    assert again.test.tokens.equal(splits[1].test.tokens)
    rows = [{tuple(row) for row in part.tokens.tolist()} for s in splits for part in (s.train, s.validation, s.test)]
    assert [len(part) for part in rows] == [30, 5, 7] * 2
    assert all(not one & other for one, other in combinations(rows, 2))
    clusters = [splits[0].of_cluster(index, 4) for index in range(4)]
    assert sum(map(len, clusters)) == 30
    other = read_text(documentation(across=across), EDGES, "edge-1", tokenizer, 64, 4)
    assert not other.test.tokens.equal(splits[1].test.tokens)


def test_edges_have_folders_of_their_own_and_need_no_others(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(cloud_topics(), 300)
    (tmp_path / "edge-0").mkdir()
    (tmp_path / "edge-0" / "own.txt").write_text("a parrot rests here " * 90)
    data = Data(
        name="text", path=str(tmp_path), train=9, validation=1, test=2, partition=Partition(across_edges="domain")
    )
    assert len(read_text(data, EDGES, "edge-0", tokenizer, 32, 0).train) == 9
    assert [is_here(data, edge) for edge in EDGES] == [True, False]
    with pytest.raises(DataError, match=r"there is no folder .*edge-1: with data.partition.across_edges = 'domain'"):
        read_text(data, EDGES, "edge-1", tokenizer, 32, 0)


def test_fewer_passages_than_clusters() -> None:
    tokenizer = train_tokenizer(cloud_topics(), 300)
    splits = read_text(documentation(), EDGES, "edge-0", tokenizer, 64, 3)
    with pytest.raises(DataError, match="edge-0 has 30 training passages for 31 clusters"):
        check_text(splits, 31, "edge-0")
