"""A worked answer to each exercise: one module a lesson, one name an exercise."""
