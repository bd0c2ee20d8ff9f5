"""Sections of the report of a run: what each shows, as text, tables and figures."""
