"""Measure how good a model is: one file per measure, and the report."""
