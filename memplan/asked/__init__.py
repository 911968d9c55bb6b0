"""What is asked: a model, a recipe, cards; and where each is read from."""
