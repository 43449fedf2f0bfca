"""Vocabulary-parallel FlashHead, and the testbed that measures output heads."""

__version__ = "0.1.0"
