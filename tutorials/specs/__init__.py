"""The checks of the exercises: one module a lesson, one function an exercise. Read one after you have answered it."""
