"""What the project aims at on one H200, in bf16, at the shapes of 2.8b: shown beside the numbers."""

from __future__ import annotations

# By case; "2.8b" stands in the names, so a toy has none.
AIMS = {
    "scan B16 D5120 L1024, forward": "≤ 0.55 ms",
    "scan B16 D5120 L1024, backward": "≤ 2.3 ms",
    "scan B1 D5120 L1024, forward": "≤ 0.055 ms",
    "scan B1 D5120 L1024, backward": "≤ 0.2 ms",
    "2-D scan B8, 4 orders of 27 x 27, D5120, forward + backward": "a third of four scans' time",
    "decode 2.8b, B1": "≥ 600 tokens/s",
    "decode 2.8b, B8": "≥ 4,500 tokens/s",
    "decode 2.8b, B64": "≥ 25,000 tokens/s",
    "decode 2.8b, B256": "≥ 42,000 tokens/s",
    "decode 2.8b, B1 int8": "≥ 900 tokens/s",
    "prefill 2.8b, B1 L1024": "≤ 15 ms",
    "prefill 2.8b, B8 L1024": "≤ 98 ms",
    "prefill 2.8b, B1 L131072": "≤ 2,500 ms",
    "B1: image (729 patches) + 32 words to the first token": "≤ 18 ms",
    "training step 2.8b, 16384 tokens (8 full rows of 2048)": "≥ 45%",
    "one sequence of 262144 tokens, memory above the weights": "no more than at 4096 and one piece",
    "short answers, distinct pictures": "≥ 50%",
    "6 questions on each picture against distinct pictures": "≥ 3 x",
}
