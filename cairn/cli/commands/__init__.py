"""The commands: each module has ``configure(parser)`` and ``run(args, terminal)``; its docstring is its help."""
