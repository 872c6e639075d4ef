"""Data: records and their reading, and the procedural world of `vlmamba.data.scenes`."""
