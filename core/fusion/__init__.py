"""Fusion: transported weights, the rows on which they replace the target's, and what a gain must beat."""

from core.fusion.transport_weights import fuse_attention_only_from_hot_dir

__all__ = ["fuse_attention_only_from_hot_dir"]
