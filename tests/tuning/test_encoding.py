"""What is learnt of a document: of a text every token, of a conversation the assistant's answers and no more."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from ecogen.errors import CheckpointError, DataError
from ecogen.models.tokenizer import load_tokenizer
from ecogen.tuning.documents import Document, Message
from ecogen.tuning.encoding import Encoded, completed, conversation, encode
from ecogen.tuning.passages import IGNORED, Passages
from ecogen.tuning.vocabulary import train_tokenizer
from tests.texts import save_text_foundation

TALK = (
    Message("system", "be brief"),
    Message("user", "who is there?"),
    Message("assistant", "a parrot"),
    Message("user", "no"),
    Message("assistant", "it rests"),
)


@lru_cache(maxsize=1)
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["who is there? a parrot it rests, be brief: no parrot rests there"] * 3, 300)


def learnt(encoded: Encoded) -> list[str]:
    """The runs of tokens that are learnt, as text."""
    runs, last = list[list[int]](), False
    for token, is_learnt in zip(*encoded, strict=True):
        if is_learnt:
            runs += [] if last else [[]]
            runs[-1].append(token)
        last = is_learnt
    return [tokenizer().decode(run) for run in runs]


def test_of_a_conversation_exactly_the_assistants_answers_are_learnt_with_their_end_marks() -> None:
    encoded = conversation(TALK, tokenizer())
    assert learnt(encoded) == ["a parrot<|eos|>", "it rests<|eos|>"]
    written = tokenizer().decode(encoded.tokens)
    assert written == (
        "<|bos|><|system|>be brief<|eos|><|user|>who is there?<|eos|><|assistant|>a parrot<|eos|><|user|>no<|eos|>"
        "<|assistant|>it rests<|eos|>"
    )
    begun = tokenizer().apply_chat_template(
        [{"role": "user", "content": "no"}], add_generation_prompt=True, tokenize=False
    )
    assert begun == "<|bos|><|user|>no<|eos|><|assistant|>"  # what a server gives the model to go on with


def test_a_template_of_other_people_is_followed() -> None:
    """ChatML, whose end mark is followed by a new line that belongs to no answer's text."""
    other = train_tokenizer(["a parrot rests"], 300)
    other.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    encoded = conversation(TALK[1:3], other)
    tokens = [token for token, is_learnt in zip(*encoded, strict=True) if is_learnt]
    assert other.decode(tokens) == "a parrot<|im_end|>\n"


def test_a_template_that_rewrites_earlier_answers_is_an_error() -> None:
    other = train_tokenizer(["a parrot rests"], 300)
    other.chat_template = "{% for m in messages %}{{ m['content'] if loop.last else '...' }}{% endfor %}"
    with pytest.raises(DataError, match="writes answer 2 in another way"):
        conversation(TALK, other)
    other.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(DataError, match="refuses a conversation: roles must alternate"):
        conversation(TALK, other)
    other.chat_template = None
    with pytest.raises(DataError, match="has no chat template; give 'prompt' and 'completion'"):
        conversation(TALK, other)


def test_of_a_prompt_and_its_completion_the_completion_is_learnt() -> None:
    encoded = completed("who is there? ", "a parrot", tokenizer())
    assert learnt(encoded) == ["a parrot<|eos|>"]
    assert tokenizer().decode(encoded.tokens) == "<|bos|>who is there? a parrot<|eos|>"


def test_labels_are_the_tokens_that_follow_and_nothing_else_counts() -> None:
    documents = [Document(messages=TALK), Document("a parrot", "who? "), Document("no", "x" * 99)]
    passages = encode(documents, tokenizer(), 64)
    assert len(passages) == 2  # of the third, nothing that is learnt fits
    for document, tokens, labels in zip(documents, passages.tokens, passages.labels, strict=False):
        whole = conversation(TALK, tokenizer()) if document.messages else completed("who? ", "a parrot", tokenizer())
        for place in range(64):
            follows = place + 1 < len(whole.tokens) and whole.is_learnt[place + 1]
            assert labels[place] == (tokens[place + 1] if follows else IGNORED)
        assert tokens[: len(whole.tokens)].tolist() == whole.tokens


def test_texts_are_cut_into_passages_that_share_no_token() -> None:
    texts = [Document("a parrot rests " * 20), Document("be brief " * 9)]
    passages = encode(texts, tokenizer(), 16)
    stream = [t for x in texts for t in tokenizer()(x.text)["input_ids"] + [tokenizer().eos_token_id]]
    rows = [
        row[: int((label >= 0).sum()) + 1].tolist() for row, label in zip(passages.tokens, passages.labels, strict=True)
    ]
    assert [token for row in rows for token in row] == stream
    assert all(len(row) == 16 for row in rows[:-1])


def test_the_loss_is_that_of_transformers(tmp_path: Path) -> None:
    folder = save_text_foundation(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    passages = encode([Document("a parrot rests in the tree")], load_tokenizer(folder), 8)
    with torch.no_grad():
        theirs = model(input_ids=passages.tokens[:1], labels=passages.tokens[:1]).loss
        ours = torch.nn.functional.cross_entropy(model(passages.tokens[:1]).logits[0], passages.labels[0])
    torch.testing.assert_close(ours, theirs)


def test_padding_is_cut_where_nothing_counts_and_keys_keep_it() -> None:
    tokens = torch.arange(12).view(2, 6)
    labels = torch.full((2, 6), IGNORED)
    labels[0, 1], labels[1, 3] = 2, 10
    passages = Passages(tokens, labels)
    assert passages.trimmed().tokens.shape == (2, 4)
    assert [part.trimmed().tokens.shape[1] for part in passages.split(2)] == [2, 4]
    keyed = Passages(tokens, labels, torch.tensor([1, 2]))
    assert keyed.trimmed() is keyed


def test_a_tokenizer_made_here_writes_every_text_and_is_an_ordinary_one(tmp_path: Path) -> None:
    tokenizer().save_pretrained(tmp_path)
    read = AutoTokenizer.from_pretrained(tmp_path)
    text = "Ærø 🦜\n\ta  b"
    ids: Tensor = read(text)["input_ids"]
    assert read.decode(ids, skip_special_tokens=True) == text
    assert (read.bos_token, read.eos_token, read.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert len(read) <= 300
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        load_tokenizer(tmp_path / "none")
