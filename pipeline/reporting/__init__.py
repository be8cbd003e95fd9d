"""Figures, tables and the report that people read."""
