"""Rows of text: records as messages, the split into calibration, fine-tuning, validation and held-out rows, tokens."""
