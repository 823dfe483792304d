"""The sample data: short facts and small talk in many languages, under CC0-1.0."""
