"""Fusion: the source's weights transported to the target, mixed with the target's own on its strongest neurons."""

from core.fusion.transport_weights import fuse_attention_only_from_hot_dir

__all__ = ["fuse_attention_only_from_hot_dir"]
