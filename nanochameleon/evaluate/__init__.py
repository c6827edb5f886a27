"""How good is a model? One file a measure, and the report."""
