"""`vlmamba data check`: is a data set ready for a run?"""

from __future__ import annotations

import json
from pathlib import Path


def check(file: str, images: str | None, report: str | None, workers: int, decode: bool, max_bad_share: float) -> int:
    """Prints what is missing, broken or surplus; 0 if a run would go through, 1 if it would stop."""
    from vlmamba.data.check import check as look
    from vlmamba.data.check import tell

    found = look(file, images, workers, decode)
    for line in tell(found, max_bad_share):
        print(line)
    if report is not None:
        Path(report).write_text(json.dumps(found.plain(), indent=1) + "\n")
    return int(found.bad_share > max_bad_share)
