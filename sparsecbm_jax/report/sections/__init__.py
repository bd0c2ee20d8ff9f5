"""Sections of the report of a run, as text, tables and figures."""
