"""What corrections repair and what they cost: editors, baselines, single edits, long sequences of edits."""
