"""What the official tools make of awkward answers, one line each, with the reason beside it."""

from __future__ import annotations

from typing import Any

import pytest

from vlmamba.evaluation.scoring import gqa, mmbench, mme, mmvet, pope, scienceqa
from vlmamba.evaluation.scoring.contractions import CONTRACTIONS
from vlmamba.evaluation.scoring.vqa import m4c_accuracy, normalize_m4c, normalize_vqa, score_vqav2, vqa_accuracy
from vlmamba.evaluation.tasks.textvqa import question_of


@pytest.mark.parametrize(
    ("raw", "official", "m4c"),
    [
        ("", "", ""),  # nothing stays nothing
        ("Yes.", "yes", "yes"),  # lower case, the period goes
        ("Yes, it is", "yes it is", "yes it is"),  # ", " deletes the comma
        ("yes,no", "yes no", "yesno"),  # a comma without a blank becomes one; M4C deletes it beforehand
        ("NO", "no", "no"),
        ("two", "2", "2"),
        ("none", "0", "0"),
        ("eleven", "eleven", "eleven"),  # number words end at ten
        ("1,000", "1000", "1000"),  # a comma between digits has marks deleted
        ("1,000 red-hot", "1000 redhot", "1000 red hot"),  # ... every mark, not only the comma
        ("red-hot", "red hot", "red hot"),
        ("red- hot", "red hot", "red hot"),  # the mark has a blank beside it: deleted
        ("a-b - c", "ab c", "ab c"),  # ... and then so are all of its kind; the lone "a" never was a word
        ("3.5", "3.5", "3.5"),  # a digit follows the period
        ("3.", "3", "3"),
        (".5", ".5", ".5"),
        ("U.S.A.", "usa", "usa"),
        ("." * 33 + "a", ". a".replace(" ", ""), ".a"),  # 32 periods at most: re.UNICODE taken for a count
        ("the cat", "cat", "cat"),
        ("a an the", "", ""),
        ("dont", "don't", "don't"),
        ("couldntve", "couldntve", "couldntve"),  # lacks two apostrophes
        ("couldn'tve", "couldn't've", "couldn't've"),
        ("youd've", "you'd've", "you'd've"),
        ("lets", "lets", "lets"),  # let's maps to itself only
        ("somebody'd", "somebodyd", "somebodyd"),  # the wrong way round
        ("mother's", "mother's", "mother 's"),  # M4C parts 's, which then can never match the other
        ("it's", "it's", "it 's"),
        ("Im", "im", "im"),  # I'm is in the table, but words are lower case by then
        ("5:30", "5:30", "5:30"),  # colons stay
        ("$5 & 10%", "$5 & 10%", "$5 & 10%"),
        ("what?", "what", "what"),
        ("line one\nline two", "line 1 line 2", "line 1 line 2"),
        ("tab\there", "tab here", "tab here"),
        ("  blanks  ", "blanks", "blanks"),
        ("İstanbul", "i̇stanbul", "i̇stanbul"),  # lower-casing makes two characters of one
        ("日本", "日本", "日本"),
        ("١,٢", "١٢", "١٢"),  # \d knows the digits of every script
        ("The answer is B.", "answer is b", "answer is b"),
        ("A or B", "or b", "or b"),  # the letter A is an article
    ],
)
def test_normalisers(raw: str, official: str, m4c: str) -> None:
    assert normalize_vqa(raw) == official
    assert normalize_m4c(raw) == m4c


def test_contractions_lack_exactly_one_apostrophe() -> None:
    assert CONTRACTIONS["aint"] == "ain't"
    assert CONTRACTIONS["yall'd've"] == CONTRACTIONS["y'alld've"] == CONTRACTIONS["y'all'dve"] == "y'all'd've"
    assert CONTRACTIONS["ow's'at"] == "'ow's'at"
    assert "yalldve" not in CONTRACTIONS
    assert "shes" not in CONTRACTIONS


def annotators(*answers: str) -> list[dict[str, Any]]:
    return [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(answers, 1)]


def test_vqa_accuracy_line_by_line() -> None:
    # Of one mind: raw comparison, so case and the period count.
    assert vqa_accuracy("yes", annotators(*["yes"] * 10)) == 1.0
    assert vqa_accuracy("Yes", annotators(*["yes"] * 10)) == 0.0
    assert vqa_accuracy(" yes\n", annotators(*["yes"] * 10)) == 1.0  # but stripping comes first
    # Not of one mind: normalised. One of ten: nine of the annotators leave 1 match (1/3), itself leaves none.
    assert vqa_accuracy("Yes.", annotators("yes", *["no"] * 9)) == pytest.approx(0.3)
    # Three of ten: seven times 3/3, three times 2/3.
    assert vqa_accuracy("yes", annotators(*["yes"] * 3, *["no"] * 7)) == pytest.approx(0.9)
    # Records alike in everything leave together: no two of these differ, so nobody is left to match.
    alike = [{"answer": "x"}] * 5 + [{"answer": "y"}] * 5
    assert vqa_accuracy("x", alike) == pytest.approx(0.5)  # only the five y see the x
    assert m4c_accuracy("x", ["x"] * 5 + ["y"] * 5) == 1.0  # M4C tells them apart by place


def test_vqav2_missing_answer_and_rounding() -> None:
    items = [
        {
            "question_id": 1,
            "question_type": "what",
            "answer_type": "other",
            "answers": annotators("a cat", *["cat"] * 9),
        },
        {"question_id": 2, "question_type": "is", "answer_type": "yes/no", "answers": annotators("no", *["yes"] * 9)},
        {"question_id": 3, "question_type": "is", "answer_type": "yes/no", "answers": annotators("", *["yes"] * 9)},
    ]
    scores = score_vqav2(items, {1: "The cat!", 99: "unknown id"})
    assert scores["perQuestion"] == {"1": 100.0, "2": 0.0, "3": 30.0}  # nothing matches the annotator who said nothing
    assert scores["overall"] == 43.33
    assert scores["perAnswerType"] == {"other": 100.0, "yes/no": 15.0}


def test_textvqa_prompts() -> None:
    s = "\nAnswer the question using a single word or phrase."
    assert question_of("What Is it?\nReference OCR token: a, b" + s) == "what is it?"
    assert question_of("Reference OCR token: a, b\nWhat Is it?" + s) == "what is it?"
    assert question_of("Reference OCR token: \nWhat Is it?" + s) == "what is it?"
    assert question_of("What Is it?" + s) == "what is it?"
    assert question_of("OCR tokens: a. Question: What\nis it? Short answer:") == "what\nis it?"
    assert question_of("no line break") is None


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes.", "yes"),
        ("YES", "yes"),
        ("Yes, there is", "yes, there is"),  # wrong: the match is exact
        ("no...", "no"),  # every period at the end
        (" no", " no"),  # a blank is not stripped here
        ("", ""),
    ],
)
def test_gqa_prediction(text: str, said: str) -> None:
    assert gqa.prediction(text) == said


def question(answer: str, structural: str = "verify", group: str | None = None, **more: Any) -> dict[str, Any]:
    types = {"structural": structural, "semantic": "obj", "detailed": "d"}
    base = {"question": "is it a cat ?", "answer": answer, "isBalanced": True, "types": types, "semantic": []}
    return base | {"groups": {"global": group, "local": None}, "entailed": []} | more


def test_gqa_line_by_line() -> None:
    questions = {
        "1": question("yes", entailed=["1", "2", "3"]),
        "2": question("no", isBalanced=False),
        "3": question("cat", "query", group="animal"),
        "4": question("dog", "query", group="animal"),
    }
    scores = gqa.score_gqa(questions, {"1": "yes", "2": "no", "3": "dog", "4": "dog", "9": "unknown id"}, None, True)
    assert scores["accuracy"] == pytest.approx(200 / 3)  # the unbalanced one is not counted
    assert (scores["binary"], scores["open"]) == (100.0, 50.0)
    # 1 is right and entails itself (left out), 2 (right) and 3 (wrong); 4 is right and entails nothing.
    assert scores["consistency"] == 50.0
    # Gold one cat, one dog; said two dogs: (0-1)^2/1 + (2-1)^2/1 = 2, over a hundred.
    assert scores["distribution"] == 0.02
    steps = [
        {"operation": "select", "argument": "cat (1)"},
        {"operation": "exist", "argument": "?"},  # not a step of reasoning
        {"operation": "query", "argument": "name"},  # nor this
        {"operation": "choose name", "argument": "a"},  # nor this
        {"operation": "choose", "argument": "nonexistent"},  # nor this: any text with "exist" in it
    ]
    assert list(gqa.score_gqa({"1": question("a", semantic=steps)}, {})["accuracyPerSteps"]) == ["1"]


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("A", "A"),
        ("F", "FAILED"),  # A to E only
        ("a", "FAILED"),
        ("A.", "FAILED"),  # too short for "X. ", and no letter alone
        ("B. a cat", "B"),
        ("B.a cat", "FAILED"),
        ("The answer is B.", "B"),
        ("The answer is B!", "B"),  # the last period is a wildcard
        ("The answer is B", "FAILED"),  # ... but something must stand there
        ("The answer is A. The answer is B.", "FAILED"),  # two matches
        ("The answer is Z.", "Z"),  # parsed, but no option
        ("", "FAILED"),
        ("A or B", "FAILED"),
        ("C. \nThe answer is D.", "C"),
    ],
)
def test_scienceqa_parse(text: str, letter: str) -> None:
    assert scienceqa.parse(text) == letter


def test_scienceqa_options_and_pictures() -> None:
    assert scienceqa.predicted_index("C", 2) == -1  # beyond the choices
    problem = {
        "choices": ["x", "y"],
        "answer": 0,
        "subject": "s",
        "hint": "",
        "image": "i.png",
        "grade": "g",
        "topic": "t",
    }
    scores = scienceqa.score_scienceqa(
        {"1": problem, "2": problem, "3": problem}, {"1": ("A", True), "2": ("A", False)}
    )
    assert (scores["correct"], scores["count"]) == (2, 3)  # the missing one is wrong
    assert (scores["img_correct"], scores["img_count"]) == (1, 1)  # but only prompts with a picture count here


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("No", "no"),
        ("NO", "yes"),  # only No, not, no
        ("No.", "no"),
        ("no, sir", "no"),
        ("Yes. No", "yes"),  # the first sentence only
        ("yes and no", "no"),
        ("there is not one", "no"),
        ("nope", "yes"),
        ("yes\nno", "yes"),  # one word: only blanks part
        ("No\nthere is not", "no"),  # "not" stands free
        ("", "yes"),
        (".no", "yes"),  # nothing before the first period
    ],
)
def test_pope_parse(text: str, said: str) -> None:
    assert pope.parse(text) == said


def test_pope_without_a_single_yes_does_not_divide_by_zero() -> None:
    scores = pope.score_split([("no", "yes"), ("no", "no")])
    assert (scores["precision"], scores["recall"], scores["f1"], scores["accuracy"]) == (0.0, 0.0, 0.0, 0.5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("YES", "yes"),
        ("Yes, it is", "yes"),
        ("No", "no"),
        ("Not at all", "no"),
        ("know", "no"),
        ("eyes", "yes"),
        ("no yes", "no"),  # four characters: "no y"
        ("nyes", "yes"),  # yes is asked first
        ("    yes", "other"),  # beyond the fourth character
        ("The answer is yes.", "other"),
        ("\n\nno", "no"),  # newlines become blanks, and count
        ("", "other"),
    ],
)
def test_mme_parse(text: str, said: str) -> None:
    assert mme.parse(text) == said


def test_mme_accuracy_plus_wants_both() -> None:
    scores = mme.score_mme({"color": [[("yes", "Yes"), ("no", "No")], [("yes", "Yes"), ("maybe", "No")]]})
    assert scores["detail"]["color"]["acc"] == 0.75
    assert scores["detail"]["color"]["acc_plus"] == 0.5
    assert scores["detail"]["color"]["other_num"] == 1  # wrong, and outside the table
    assert scores["scores"]["Perception"] == {"tasks": {"color": 125.0}, "total": 125.0}


OPTIONS = {"A": "a red car", "B": "CO2", "C": "No"}


@pytest.mark.parametrize(
    ("text", "old", "current"),
    [
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("(B)", "B", "B"),
        ("b", None, None),  # capitals only
        ("The answer is B.", "B", "B"),
        ("The correct answer is **B**.", "B", "B"),
        ("A or B", None, None),
        ("A photo of CO2", "A", "A"),  # the article is an answer
        ("A photo of some CO2", "A", "B"),  # ... unless four other pieces follow it
        ("A: because A is right", "A", None),  # the first A is too far from the end
        ("E", "E", None),  # none of them, whatever the options
        ("D", "D", None),  # counted although this question has no D
        ("Z", None, "Z"),
        ("It is CO2", "B", "B"),  # by its text
        ("CO2 or a red car", None, None),  # two texts
        ("nothing", "C", "C"),  # "no" is in it
        ("answer is **b**", None, "B"),  # any case, stars allowed
        ("I can't process this file.", "E", "Z"),
        ("Cannot determine the answer", "C", "Z"),  # a refusal to one; to the other "cannot" holds "no"
        ("", None, None),
        ("a red car " * 9, "A", None),  # longer than twice all options together
        ("Failed to obtain answer via API. B", None, None),  # letters are not looked for
    ],
)
def test_mmbench_rules(text: str, old: str | None, current: str | None) -> None:
    assert mmbench.infer_option(text, OPTIONS, "2023-12") == old
    assert mmbench.infer_option(text, OPTIONS, "current") == current


# What each scorer reads in the same answer, to "is it red?" or a choice of OPTIONS:
# text, GQA, ScienceQA, POPE, MME, MMBench 2023-12, MMBench current.
AWKWARD = [
    ("two", "two", "FAILED", "yes", "other", None, None),  # numerals are made digits by the VQA scorers alone
    ("2", "2", "FAILED", "yes", "other", None, None),
    ("isn't", "isn't", "FAILED", "yes", "other", None, None),  # a contraction is no "not" to POPE
    ("don't know", "don't know", "FAILED", "yes", "other", "C", "C"),  # option "No" is a part of "know"
    ("no\nyes", "no\nyes", "FAILED", "yes", "no", "C", "C"),  # POPE parts at blanks only: no word "no"
    ("B\nbecause it is", "b\nbecause it is", "FAILED", "yes", "other", "B", "B"),
    ("n\u041e", "n\u043e", "FAILED", "yes", "other", None, None),  # a Cyrillic O is no o
    ("\uff22", "\uff42", "FAILED", "yes", "other", None, None),  # nor is a full-width B an option
    ("non, c'est bleu", "non, c'est bleu", "FAILED", "yes", "no", "C", "C"),
    ("Yes, two", "yes, two", "FAILED", "yes", "yes", None, None),
    ("Yes, B", "yes, b", "FAILED", "yes", "yes", "B", "B"),
    ("NO", "no", "FAILED", "yes", "no", "C", "C"),
    ("No!", "no!", "FAILED", "yes", "no", "C", "C"),  # "No!" is another word than "No"
    ("The answer is B.", "the answer is b", "B", "yes", "other", "B", "B"),
    ("A and B", "a and b", "FAILED", "yes", "other", None, None),
    ("B, not A", "b, not a", "FAILED", "no", "other", "C", "C"),  # two letters: texts are tried, "no" is in "not"
]


@pytest.mark.parametrize(("text", "in_gqa", "in_scienceqa", "in_pope", "in_mme", "old", "current"), AWKWARD)
def test_the_same_answer_to_every_scorer(
    text: str, in_gqa: str, in_scienceqa: str, in_pope: str, in_mme: str, old: str | None, current: str | None
) -> None:
    assert gqa.prediction(text) == in_gqa
    assert scienceqa.parse(text) == in_scienceqa
    assert pope.parse(text) == in_pope
    assert mme.parse(text) == in_mme
    assert mmbench.infer_option(text, OPTIONS, "2023-12") == old
    assert mmbench.infer_option(text, OPTIONS, "current") == current


def test_mmbench_groups_end_at_the_first_wrong_copy() -> None:
    def row(index: int, answer: str, prediction: str) -> dict[str, Any]:
        options = {"A": "alpha", "B": "beta"}
        return {
            "index": index,
            "answer": answer,
            "prediction": prediction,
            "category": "c",
            "l2-category": "l",
            **options,
        }

    rows = [row(1, "A", "A"), row(1_000_001, "B", "B"), row(2, "A", "A"), row(1_000_002, "B", "A")]
    scores = mmbench.score_mmbench(rows)
    assert scores["hit"] == {"1": 1, "2": 0}
    assert scores["acc"] == {"Overall": 0.5, "l": 0.5, "c": 0.5}
    asked = []

    def judge(row: Any, prediction: str) -> str:
        asked.append(row["index"])
        return "A or B"

    # A copy that is wrong by rule ends its group before the judge is asked; the judge gets three tries.
    rows = [row(1, "A", "hm"), row(1_000_001, "B", "A"), row(2, "A", "hm"), row(1_000_002, "B", "B")]
    scores = mmbench.score_mmbench(rows, ask=judge)
    assert asked == [2, 2, 2]
    assert scores["undecided"] == [2]
    assert scores["hit"] == {"1": 0, "2": 0}
    with pytest.raises(ValueError, match="2023-12, current"):
        mmbench.score_mmbench(rows, "2024")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("0.5", 0.5),
        ("1", 1.0),
        ("0.3\n", 0.3),
        ("0.8 because", 0.8),
        (" 0.7", None),  # an empty piece stands before the blank
        ("0.9.", None),
        ("1.5", None),
        ("-0.2", None),
        ("nan", None),
        ("Correctness: 0.4", None),
        ("", None),
    ],
)
def test_mmvet_grades(reply: str, value: float | None) -> None:
    assert mmvet.parse_grade(reply) == value


def test_mmvet_gives_up_after_five_parses() -> None:
    calls = []

    def ask(prompt: str, temperature: float) -> str:
        calls.append((prompt.endswith(mmvet.ASK_AGAIN), temperature))
        return "hm" if len(calls) < 6 else "1.0"  # the sixth reply is asked for, and not read

    assert mmvet.grade("p", ask)[0] == 0.0
    assert calls == [(False, 0.0), (True, 0.0), (True, 0.5), (True, 1.0), (True, 1.5), (True, 2.0)]


def test_mmvet_prompt() -> None:
    assert mmvet.judge_prompt("shots", "q?", "1<AND>2<OR>3", "x") == "shots\nq? | 1 <AND> 2 <OR> 3 | x | "


def test_mmvet_rounds_as_numpy_does() -> None:
    metadata = {str(i): {"capability": ["rec"]} for i in range(200)}
    scores = mmvet.score_mmvet(metadata, {"0": [0.1]})  # 0.05, the float a little above: half to even all the same
    assert (scores["total"], scores["runs"], scores["perCapability"]) == (0.0, [0.0], {"rec": 0.0})
