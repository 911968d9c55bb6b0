"""What a user calls a model, a recipe or a run -> what memplan asks itself."""
