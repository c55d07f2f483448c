"""The command ``amflow``: a demo, pictures of any video, training, evaluation, checks of lists, a report.

The module `main` lists the subcommands. Importing a module of this package needs only torch. A subcommand that needs
an extra names it if it is missing.
"""
