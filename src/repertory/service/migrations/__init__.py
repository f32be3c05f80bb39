"""The schema's history. A released migration is never edited; the next one expands or contracts it."""
