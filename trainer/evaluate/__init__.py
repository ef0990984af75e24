"""One small file for each evaluator, which yields (name, value); a recipe asks for it by the file's name."""
