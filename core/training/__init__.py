"""Fine-tuning a fused checkpoint: what is trained, on what, and how its weights are written back."""
