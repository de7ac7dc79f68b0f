"""The processes of a launch: how they join, what they tell each other, how they stop, and what happens when one fails."""
