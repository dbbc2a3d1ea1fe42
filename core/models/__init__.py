"""Models: their families, where they are, their weights on disk, what they read and the activations they give."""
