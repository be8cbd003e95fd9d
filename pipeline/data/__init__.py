"""Prepared data: its layout, how it is read, which labels are known."""
