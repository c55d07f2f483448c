"""Hooks that take q and k out of other people's models. Each module needs its own optional package."""
