"""Naive twins of the engine, written from the documents alone: whole tensors, plain loops, no torch in the noise."""
