"""Gains and costs of corrections: editors, baselines, single edits, long sequences of edits."""
