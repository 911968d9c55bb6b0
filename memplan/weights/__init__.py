"""How weights lie in memory and are multiplied by: one file a format."""
