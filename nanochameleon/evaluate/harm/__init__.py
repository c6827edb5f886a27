"""Optional. Buys the safety evaluation: prompts, refusals, labels by people, and the paper's Table 5. safety.py is the
command, red_team.py reads and writes conversations."""
