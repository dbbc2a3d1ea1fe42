"""The benchmarks of the six tasks: their items, prompts, answers and scores."""
