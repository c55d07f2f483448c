"""Device code, which `launch` runs."""
