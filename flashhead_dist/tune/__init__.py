"""Choosing an index's parameters by measurement: what each choice reads, finds and takes."""
