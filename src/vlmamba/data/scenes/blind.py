"""What can be answered without the picture: the constant answer of each type of question, and a guesser that reads.

These are the yardsticks of every accuracy on scenes. A guesser that beats the constant answer shows a leak.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from vlmamba.data.scenes.question import Question

_CANDIDATES = 30  # the commonest answers of a type, which the guesser weighs


def majority(known: Iterable[Question], asked: Sequence[Question]) -> dict[str, float]:
    """Accuracy by skill of answering each type (`form`) with its commonest answer among `known`.

    For alternatives named in the text, and for lettered ones, the answer is their position.
    """
    counts: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for question in known:
        counts[question.form][question.guess] += 1
    best = {form: count.most_common(1)[0][0] for form, count in counts.items()}
    return _by_skill(asked, [best.get(q.form, "") for q in asked])


def guesser(known: Iterable[Question], asked: Sequence[Question]) -> dict[str, float]:
    """Accuracy by skill of naive Bayes over the words of the question (with their places) within each type."""
    models: defaultdict[str, _Bayes] = defaultdict(_Bayes)
    for question in known:
        models[question.form].learn(_features(question), question.guess)
    return _by_skill(asked, [models[q.form].answer(_features(q)) if q.form in models else "" for q in asked])


def _by_skill(asked: Sequence[Question], guesses: Sequence[str]) -> dict[str, float]:
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for question, guess in zip(asked, guesses):
        total[question.skill] += 1
        right[question.skill] += guess == question.guess
    return {skill: right[skill] / total[skill] for skill in total}


def _features(question: Question) -> list[str]:
    words = question.text.rstrip("?.").split()
    lettered = [f"{letter} {option}" for letter, option in zip("ABCDE", question.choices or ())]
    pairs = [f"{a} {b}" for a, b in pairwise(words)]
    return [*words, *pairs, *(f"{i} {w}" for i, w in enumerate(words)), *lettered]


@dataclass
class _Bayes:
    answers: Counter[str] = field(default_factory=Counter)
    words: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))

    def learn(self, features: list[str], answer: str) -> None:
        self.answers[answer] += 1
        for feature in features:
            self.words[feature][answer] += 1

    def answer(self, features: list[str]) -> str:
        total = self.answers.total()
        seen = [self.words[f] for f in features if f in self.words]

        def score(answer: str) -> float:
            prior = self.answers[answer]
            likely = sum(math.log((w[answer] + 2 * prior / total) / (prior + 2)) for w in seen)
            return math.log(prior) + likely / math.sqrt(len(seen) or 1)

        return max((a for a, _ in self.answers.most_common(_CANDIDATES)), key=score)
