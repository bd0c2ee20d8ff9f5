"""Embedded synthetic restaurant reviews, so that everything runs without a download."""
