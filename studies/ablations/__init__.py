"""The paper's ablations at nano scale: `python -m studies.ablations`; docs/study.md says what is compared."""
