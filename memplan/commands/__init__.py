"""The subcommands, one module each: ``parser()`` says what it takes, ``run(arguments)`` answers."""
