"""Optional. Buys human evaluation: blinded studies, votes in SQLite, and the paper's tables. human.py is the front."""
