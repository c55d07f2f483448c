"""The implementations of AM flow. Each module stands alone: none imports another."""
