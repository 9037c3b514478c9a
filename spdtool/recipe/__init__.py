"""The recipe: every number that changes a result (`fields`), and how it is read (`reading`)."""
