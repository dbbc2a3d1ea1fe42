"""Transport and Merge: cross-architecture fusion of language models by optimal transport (arXiv 2602.05495)."""
