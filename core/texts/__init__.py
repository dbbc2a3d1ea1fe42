"""Rows of text: messages, their split into calibration, training, validation and held-out rows, and their tokens."""
