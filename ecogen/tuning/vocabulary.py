"""A tokenizer made here: byte-level BPE over a corpus, with marks for conversations and a chat template."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from ecogen.models.pair_tokens import BEGIN, image_marks

BOS, EOS, PAD = "<|bos|>", "<|eos|>", "<|pad|>"
ROLES = ("system", "user", "assistant")

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

PICTURE_TEMPLATE = (
    "{{ bos_token }}"
    "{% set seen = namespace(pictures=0) %}"
    "{% for message in messages if message['content'] is not string %}"
    "{% for part in message['content'] if part['type'] == 'image' %}"
    "{% set seen.pictures = seen.pictures + 1 %}{{ '" + BEGIN + "' }}"
    "{% endfor %}{% endfor %}"
    "{% if seen.pictures != 1 %}"
    "{{ raise_exception('send one picture; this model says what it shows, whatever the text beside it asks') }}"
    "{% endif %}"
)
"""Of a model that learnt pictures with captions and nothing else: what answers is the picture's caption."""


def train_tokenizer(texts: Iterable[str], vocabulary_size: int, num_image_codes: int = 0) -> PreTrainedTokenizerFast:
    """An ordinary tokenizer of transformers; the same for the same texts. Every text can be written in its tokens.

    Args:
        vocabulary_size: at most, marks and the 256 bytes included.
        num_image_codes: of the image tokenizer, each of which is a mark too; 0 where there are no images.
    """
    marks = [PAD, BOS, EOS, *(f"<|{role}|>" for role in ROLES)]
    marks += [*image_marks(num_image_codes)] if num_image_codes else []
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocabulary_size,
            special_tokens=marks,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=marks[3:],
        chat_template=PICTURE_TEMPLATE if num_image_codes else CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
