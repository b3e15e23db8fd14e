"""The entries of the leaderboard that ship with the package; `far_env.evaluation.leaderboard` finds them."""
