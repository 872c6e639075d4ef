"""A procedural visual world: pictures of things, shapes, text, tables and charts, with questions that have one answer.

world = World(seed=0, split="train")
sample = world.sample(17)       # image, caption, description, questions
world.marked(17)                # image, and what is drawn where
world.text(17)                  # a passage for language pre-training, nothing drawn
"""

from __future__ import annotations

from vlmamba.data.scenes.marks import FIELDS, Mark
from vlmamba.data.scenes.question import SKILLS, Question
from vlmamba.data.scenes.world import KINDS, SPLITS, SceneSample, World

__all__ = ["FIELDS", "KINDS", "SKILLS", "SPLITS", "Mark", "Question", "SceneSample", "World"]
