"""The commands: each module has ``NAME``, ``HELP``, ``configure(parser)`` and ``run(args, terminal)``."""
