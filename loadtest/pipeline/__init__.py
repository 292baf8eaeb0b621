"""The recipe's pipeline: the stages of all four packages, one after the other, and their result."""
