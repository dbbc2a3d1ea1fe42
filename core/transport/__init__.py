"""The transport solver: entropic optimal transport between two sets of neurons or layers."""
