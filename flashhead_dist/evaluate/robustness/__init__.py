"""Indexes of made-up output embeddings with the shapes and oddities of other models' heads."""
