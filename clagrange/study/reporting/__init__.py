"""What a study says of its results: numbers, intervals and tests, tables, pictures, events, the report.

No number of a run depends on what is in here.
"""
