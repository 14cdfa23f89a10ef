"""One file for each family of models: how its files read as our parameters, and back."""
