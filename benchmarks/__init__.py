"""Scripts that produced a published number. They run anywhere and compare side by side, in one
run."""
