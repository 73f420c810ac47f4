"""The recipe: schema, loading, running."""
