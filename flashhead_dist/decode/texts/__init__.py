"""Greedy texts of heads beside the dense head's: where they first part."""
