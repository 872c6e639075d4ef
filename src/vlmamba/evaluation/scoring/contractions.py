"""The contractions of the VQA evaluator: which spelling without an apostrophe becomes which with it."""

from __future__ import annotations

# Each word stands for a rule: every form of it that lacks exactly one of its apostrophes is mapped to it. So "ain't"
# comes from "aint", and "couldn't've" from "couldnt've" and "couldn'tve", but never from "couldntve".
_WORDS = """
ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm I've
isn't it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't
somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's they'd
they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's where've who'd
who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've
couldn't've hadn't've he'd've I'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've
something'd've there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've 'ow's'at
"""


def _lacking_one(word: str) -> list[str]:
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


# "I'm" and its like are kept although they never fire: words are lower-cased before they are looked up here.
# "let's" and "she's" map to themselves only in the official table, so "lets" and "shes" stay as they are: no entry.
CONTRACTIONS: dict[str, str] = {form: word for word in _WORDS.split() for form in _lacking_one(word)}
# The official table has this entry the wrong way round: it takes the apostrophe away.
CONTRACTIONS["somebody'd"] = "somebodyd"
