"""The subcommands, one module each: ``parser()`` says what it takes, ``run(arguments)`` answers."""

COMMANDS = (
    "plan",
    "fit",
    "frontier",
    "compare",
    "trace",
    "verify",
    "campaign",
    "report",
    "diff",
    "models",
    "gpus",
    "completion",
)
