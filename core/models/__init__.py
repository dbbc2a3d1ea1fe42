"""Models as files: families, where a model is, its weights, its activations."""
