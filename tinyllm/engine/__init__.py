"""Rows of tokens that are continued: the decode loop, and what a call of ``generate`` makes of it."""
