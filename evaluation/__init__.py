"""Evaluation of fused and adapted models: held-out losses of all arms (stage 4), benchmarks, and tables of both.

A regular package, as `core` is: without this file an installed package named `evaluation` would win over the folder,
whatever the order of `sys.path`.
"""
