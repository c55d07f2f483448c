"""The implementations of AM flow. None imports another."""
