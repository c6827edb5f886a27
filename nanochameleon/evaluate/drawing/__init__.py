"""Optional. Buys evaluations of drawn images: folders that official scorers read, and the shapes world judged by
GenEval's rules."""
